"""How config.json is read: typed access that names the field when its value cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from baton.errors import UnsupportedModel

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Fields:
    """A JSON object with defaults beneath it. `where` names it in error messages.

    A field that is null counts as missing, except where a method says otherwise.
    """

    where: str
    values: Mapping[str, object]
    defaults: Mapping[str, object]

    def given(self, name: str) -> object:
        """The value as written, else its default, else None. An explicit null hides the default."""
        return self.values[name] if name in self.values else self.defaults.get(name)

    def integer(self, name: str) -> int:
        value = self.optional_integer(name)
        return self._present(name, value)

    def optional_integer(self, name: str) -> int | None:
        value = self.given(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self.wrong(name, "an integer")
        return int(value)

    def positive(self, name: str) -> int:
        value = self.integer(name)
        if value < 1:
            raise self.wrong(name, "a positive integer")
        return value

    def number(self, name: str) -> float:
        return self._present(name, self.optional_number(name))

    def optional_number(self, name: str) -> float | None:
        value = self.given(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, "a number")
        return float(value)

    def text(self, name: str) -> str:
        value = self.given(name)
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def flag(self, name: str) -> bool:
        """A boolean; missing or null is false."""
        value = self.given(name)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of integers, or one; missing or null is empty."""
        value = self.given(name)
        if value is None:
            return ()
        items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.wrong(name, "an integer or a list of integers")
        return tuple(items)

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.given(name)
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise self.wrong(name, "a list of numbers")
        if not all(isinstance(item, int | float) for item in value):
            raise self.wrong(name, "a list of numbers")
        return tuple(float(item) for item in value)

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings; None where missing or null."""
        value = self.given(name)
        if value is None:
            return None
        if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of strings")
        return tuple(value)

    def inner(self, name: str) -> Fields | None:
        """The object under `name`; None where missing or null."""
        value = self.given(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(f"{self.where}: {name}", value, {})

    def wrong(self, name: str, expected: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.where}: {name} must be {expected}, not {self.given(name)!r}")

    def _present(self, name: str, value: Number | None) -> Number:
        if value is None:
            raise UnsupportedModel(f"{self.where}: {name} is missing")
        return value

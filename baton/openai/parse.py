"""How a request body becomes a struct, and how what is wrong with it is named."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from baton.errors import InvalidRequest
from baton.openai.schema import HARMLESS, UNSUPPORTED

Body = TypeVar("Body", bound=msgspec.Struct)

_LOCATION = re.compile(r" - at `(?:key in )?\$\.?(?P<path>.*)`$")
_NAMED = re.compile(r"(?:missing required|unknown) field `(?P<name>.*?)`")


class BodyParser(Generic[Body]):
    """Parses JSON bodies into one kind of struct."""

    def __init__(self, kind: type[Body]) -> None:
        self._kind = kind
        self._decoder = msgspec.json.Decoder(kind)
        self._known = frozenset(kind.__struct_fields__)

    def parse(self, body: bytes) -> Body:
        """
        Raises:
            InvalidRequest: naming the field at fault, or `body` when it is not JSON at all.
        """
        try:
            return self._decoder.decode(body)
        except msgspec.ValidationError as error:
            refusal = invalid(error)
            if "unknown field" not in str(error):
                raise refusal from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _not_json(body, error) from error
        # Off the usual path: drop fields that ask for nothing and judge the rest again.
        try:
            return self.convert(msgspec.json.decode(body))
        except RecursionError as error:
            # The decoder skips what it does not know, so this is most likely the field it met first.
            field = refusal.field or "body"
            raise InvalidRequest(f"{field}: nested too deeply", field=field) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _not_json(body, error) from error

    def convert(self, content: object) -> Body:
        """The struct of an already decoded body.

        Raises:
            InvalidRequest: naming the field at fault.
        """
        if isinstance(content, dict):
            content = {
                name: value
                for name, value in content.items()
                if name in self._known or not _asks_for_nothing(name, value, content)
            }
        try:
            return msgspec.convert(content, self._kind)
        except msgspec.ValidationError as error:
            raise invalid(error) from error


def invalid(error: msgspec.ValidationError) -> InvalidRequest:
    """What msgspec found wrong, with the field named first."""
    text = str(error)
    path = ""
    if location := _LOCATION.search(text):
        path, text = location["path"], text[: location.start()]
    if named := _NAMED.search(text):
        path = f"{path}.{named['name']}" if path else named["name"]
        text = "this field is required" if "missing" in text else "unknown field"
    field = path.replace("[...]", "") or "body"
    return InvalidRequest(f"{field}: {text[0].lower()}{text[1:]}", field=field)


def _asks_for_nothing(name: str, value: object, content: Mapping[str, object]) -> bool:
    if name in HARMLESS:
        return True
    neutral = UNSUPPORTED.get(name)
    if neutral is None:
        return False
    # `==` alone would let False pass for 0 and True for 1.
    if any(type(value) is type(allowed) and value == allowed for allowed in neutral):
        return True
    if name == "best_of" and type(value) is int and value == content.get("n"):
        return True
    raise InvalidRequest(f"{name}: {_shown(value)} is not supported here; leave {name} out", field=name)


def _shown(value: object) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 64 else f"{text[:61]}..."


def _not_json(body: bytes, error: Exception) -> InvalidRequest:
    if isinstance(error, RecursionError):
        return InvalidRequest("body: nested too deeply", field="body")
    field = _field_at_fault(body)
    if field is not None:
        return InvalidRequest(
            f"{field}: holds something JSON cannot (NaN, Infinity, or text that is not UTF-8)", field=field
        )
    return InvalidRequest(f"body: not valid JSON: {error}", field="body")


def _field_at_fault(body: bytes) -> str | None:
    """The top-level field whose value only a lenient parser accepts."""
    try:
        content: Any = json.loads(body.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    for name, value in content.items():
        try:
            msgspec.json.decode(json.dumps(value))
        except (msgspec.DecodeError, RecursionError):
            return name if name.isprintable() else None
    return None

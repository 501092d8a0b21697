"""How an answer is taken apart into content and calls while it arrives: what all formats have in common."""

from __future__ import annotations

import json
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from typing import ClassVar, NamedTuple, TypeVar

from baton.text.tool_calls.braces import Braces
from baton.text.tool_calls.rules import Function

Found = TypeVar("Found")
Steps = Generator[None, None, Found]
"""Reads on; yields where that takes more text than there is, and never once the text has ended."""

_ARGUMENTS = ("arguments", "parameters")
# The way models write it. Bounded, so that looking again costs little; whatever is longer is read as a whole.
_HEADER = re.compile(
    r'\{\s{0,64}"name"\s{0,64}:\s{0,64}"(?P<name>[^"\\]{1,256})"\s{0,64},'
    r'\s{0,64}"(?:arguments|parameters)"\s{0,64}:\s{0,64}(?=\{)'
)


class Content(NamedTuple):
    """Text that is part of no call."""

    text: str


class Call(NamedTuple):
    """A call begins."""

    name: str


class Arguments(NamedTuple):
    """More of the JSON that is the last call's arguments, as the model wrote it."""

    text: str


Part = Content | Call | Arguments


class ToolCallParser(ABC):
    """Reads one choice's text. What it finds does not depend on how the text is cut into pieces.

    What turns out to be no call is content, marks included: nothing is lost but the marks of calls and the
    blanks around them. A call begins as soon as its name is known and its arguments are a JSON object; then
    they are whatever the model writes up to the bracket that closes them, or to where they can be no JSON.
    """

    name: ClassVar[str]
    """What the format is called in settings."""
    marks: ClassVar[tuple[str, ...]]
    """What sets calls apart from content. In many tokenizers these are special tokens."""
    marked: ClassVar[bool] = True
    """Whether a call begins like no JSON does."""

    def __init__(self) -> None:
        self._text = ""  # arrived and not yet taken
        self._ended = False
        self._parts: list[Part] = []
        self._blanks = ""  # content, unless a call follows or has just ended
        self._after_call = False
        self._steps = self._answer()

    def push(self, text: str) -> list[Part]:
        """What is known now that `text` has arrived."""
        self._text += text
        return self._go_on()

    def finish(self) -> list[Part]:
        """What is known now that no more text comes."""
        self._ended = True
        parts = self._go_on()
        if self._blanks and not self._after_call:
            parts.append(Content(self._blanks))
        return parts

    @classmethod
    def new_id(cls) -> str:
        """An id for a call, such as the format's chat templates take."""
        return f"call_{uuid.uuid4().hex[:24]}"

    @classmethod
    @abstractmethod
    def grammar(cls, functions: Sequence[Function], mark: Callable[[str], str], *, several: bool) -> str:
        """The rule calls, in Lark's notation: what an answer is that calls one of `functions`, or `several`
        times some. `mark` says how each of `marks` is written.
        """

    @abstractmethod
    def _answer(self) -> Steps[None]:
        """Read all of the answer."""

    def _go_on(self) -> list[Part]:
        next(self._steps, None)
        parts, self._parts = self._parts, []
        return parts

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

    def _say(self, text: str) -> None:
        """`text` is content; blanks at its end wait for what follows."""
        text = self._blanks + text
        content = text.rstrip()
        self._blanks = text[len(content) :]
        if content:
            self._parts.append(Content(content))
            self._after_call = False

    def _content_to(self, mark: str) -> Steps[bool]:
        """What stands before the next `mark`, which is taken too, is content; so is all, if there is none."""
        while True:
            at = self._text.find(mark)
            if at >= 0:
                self._say(self._take(at))
                self._take(len(mark))
                return True
            kept = 0 if self._ended else _beginning_of(mark, self._text)
            self._say(self._take(len(self._text) - kept))
            if self._ended:
                return False
            yield

    def _rest(self) -> Steps[None]:
        """All that follows is content."""
        while True:
            self._say(self._take(len(self._text)))
            if self._ended:
                return
            yield

    def _gap(self, separators: str = "") -> Steps[str]:
        """Take blanks and `separators`, up to the first character that is neither."""
        gap = ""
        while True:
            rest = self._text.lstrip(" \t\r\n" + separators)
            gap += self._take(len(self._text) - len(rest))
            if rest or self._ended:
                return gap
            yield

    def _optional(self, mark: str) -> Steps[str]:
        """Take `mark` if it is next; of an answer that ends within it, what there is."""
        while len(self._text) < len(mark) and mark.startswith(self._text) and not self._ended:
            yield
        return self._take(len(mark)) if mark.startswith(self._text[: len(mark)]) else ""

    def _call(self, before: str) -> Steps[bool]:
        """Take an object with a function's name and arguments.

        False: there is none, and `before` and what was looked at are content. No text is looked at twice.
        """
        whole = Braces()
        while not self._text and not self._ended:
            yield
        while self._text.startswith("{"):
            if header := _HEADER.match(self._text):
                self._take(header.end())
                yield from self._call_of(header["name"])
                yield from self._close()
                return True
            end = whole.end(self._text)
            if end is not None and self._whole_call(end):
                return True
            if end is not None or whole.broken or self._ended:
                break
            yield
        self._say(before + self._take(whole.at))
        return False

    def _call_of(self, name: str) -> Steps[None]:
        """Begin a call; its arguments, next in the text, are passed on as they come."""
        self._begin(name)
        braces = Braces()
        while True:
            end = braces.end(self._text)
            if self._ended and not braces.broken and end is None:
                braces.at = len(self._text)  # cut off in the middle
            if arguments := self._take(braces.at):
                self._parts.append(Arguments(arguments))
            braces.taken()
            if end is not None or braces.broken or self._ended:
                return
            yield

    def _close(self) -> Steps[None]:
        """Take what is left of the object around the arguments, if it is well-formed."""
        braces = Braces(depth=1)
        while (end := braces.end(self._text)) is None:
            if self._ended or braces.broken:
                return
            yield
        self._take(end)

    def _whole_call(self, end: int) -> bool:
        """Take the object of `end` characters as a call, if it is one written in an unusual way."""
        try:
            found = json.loads(self._text[:end], strict=False)
        except (ValueError, RecursionError):
            return False
        name = found.get("name")
        arguments = next((found[key] for key in _ARGUMENTS if key in found), None)
        if not (isinstance(name, str) and name and name.isprintable() and isinstance(arguments, dict)):
            return False
        self._take(end)
        self._begin(name)
        self._parts.append(Arguments(json.dumps(arguments)))
        return True

    def _begin(self, name: str) -> None:
        self._blanks = ""
        self._after_call = True
        self._parts.append(Call(name))


def _beginning_of(mark: str, text: str) -> int:
    """Length of the longest end of `text` that begins `mark`."""
    longest = min(len(text), len(mark) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(mark[:length])), 0)

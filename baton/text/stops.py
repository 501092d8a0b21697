"""Where a streamed text must end because of a stop string, and what may be shown before that is known."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in a text that arrives in pieces.

    First is the one that is complete first; of several complete at the same character, the longest.
    The answer does not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool) -> None:
        """`stops` are not empty strings. `include_stop`: the stop string itself is part of the text."""
        self._stops = stops
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be shown now and the stop string that ended it, if one did.

        What might be the beginning of a stop string is held back until it is known.
        """
        text = self._held + text
        found: tuple[int, int, str] | None = None
        for stop in self._stops:
            at = text.find(stop)
            if at >= 0 and (found is None or (at + len(stop), at) < found[:2]):
                found = (at + len(stop), at, stop)
        if found is not None:
            end, start, stop = found
            self._held = ""
            return text[: end if self._include_stop else start], stop
        kept = self._longest_beginning(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], None

    def flush(self) -> str:
        """What is held back when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0

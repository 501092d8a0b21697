"""What happened to one request, for whoever wonders why it took so long."""

from __future__ import annotations

import time
import uuid


class Story:
    """A request from its first attempt on. `request_id` is what routers and workers call it in their logs."""

    def __init__(self, about: str) -> None:
        self.request_id = f"chaos-{uuid.uuid4().hex[:12]}"
        self.began_s = time.time()
        self.seconds = 0.0
        self._about = about
        self._said: list[str] = []
        self._silence_s = self._silent_from_s = 0.0

    def heard(self) -> None:
        """Something of the answer has come."""
        before, self.seconds = self.seconds, time.time() - self.began_s
        if self.seconds - before > self._silence_s:
            self._silence_s, self._silent_from_s = self.seconds - before, before

    def say(self, what: str) -> None:
        """An attempt has ended in this way."""
        self.heard()
        self._said.append(f"{what} at {self.seconds:.1f} s")

    @property
    def silence(self) -> tuple[float, float]:
        """The longest time in which nothing came, as `time.time`."""
        began_s = self.began_s + self._silent_from_s
        return began_s, began_s + self._silence_s

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.began_s))
        silence = f"nothing came for {self._silence_s:.1f} s from {self._silent_from_s:.1f} s on"
        return f"{self.seconds:.1f} s: {self._about}, {self.request_id}, from {clock} on: " + "; ".join(
            (*self._said, silence)
        )

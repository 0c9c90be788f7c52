"""How long each phase of a start took."""

from __future__ import annotations

import time
from collections.abc import Callable


class Phases:
    """A stopwatch that is told of the end of each phase."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        now = self._clock()
        self._seconds[name] = now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())

"""The one deadline that a request carries through every call it makes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from types import TracebackType
from typing import Self, TypeVar

from protos.rpc.errors import DeadlineError

T = TypeVar("T")
TIME_IS_UP = "the request's time is up"


def remaining(deadline: float) -> float:
    """Seconds left until `deadline`, a time of `time.monotonic`; DeadlineError if there are none."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise DeadlineError(TIME_IS_UP)
    return seconds


async def within(timeout_seconds: float, work: Awaitable[T]) -> T:
    """What `work` ends with; DeadlineError if that takes longer."""
    try:
        async with asyncio.timeout(timeout_seconds):
            return await work
    except TimeoutError:
        raise DeadlineError(TIME_IS_UP) from None


class StallWatch:
    """Ends the block with DeadlineError when one wait in it takes longer than `seconds`.

    Cheaper than a timeout around each of many waits: set `since` to the loop's time before one and to None
    after it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._timer = self._loop.call_later(seconds, self._look)
        self._is_stalled = False
        self.since: float | None = None

    def _look(self) -> None:
        waited = 0.0 if self.since is None else self._loop.time() - self.since
        if waited < self._seconds:
            self._timer = self._loop.call_later(self._seconds - waited, self._look)
        elif self._task is not None:
            self._is_stalled = True
            self._task.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._is_stalled and self._task is not None:
            self._task.uncancel()
            raise DeadlineError(TIME_IS_UP) from None

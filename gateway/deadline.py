"""The one deadline that a request carries through every call it makes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

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

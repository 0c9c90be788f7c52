"""Several streams as one, in the order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


def merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    """Yields the items of all streams at the reader's pace; the first failure ends them all and is raised."""
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _merge(streams: Sequence[AsyncGenerator[T]]) -> AsyncGenerator[T]:
    queue: asyncio.Queue[T | _End] = asyncio.Queue(maxsize=len(streams))
    tasks = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        num_open = len(tasks)
        while num_open:
            arrived = await queue.get()
            if not isinstance(arrived, _End):
                yield arrived
            elif arrived.error is not None:
                raise arrived.error
            else:
                num_open -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _End:
    """A stream is over, with an error or without."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error


async def _pump(stream: AsyncGenerator[T], queue: asyncio.Queue[T | _End]) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                await queue.put(item)
    except Exception as error:  # noqa: BLE001 - it is raised again by the reader
        await queue.put(_End(error))
    else:
        await queue.put(_End())

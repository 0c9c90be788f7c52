"""Where the engine's thread leaves a request's outputs for the coroutine that reads them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from gpu_worker.engine.sequence import StepOutput


class Mailbox:
    """Outputs not yet read, merged: a slow reader gets fewer and longer ones, and never holds up the engine.

    Made and read on one event loop; `put` and `fail` run there too, sent by the engine's thread.
    """

    def __init__(self, num_sequences: int) -> None:
        self.loop = asyncio.get_running_loop()
        self._num_unfinished = num_sequences
        self._unread: dict[int, StepOutput] = {}
        self._error: Exception | None = None
        self._arrival = asyncio.Event()

    @property
    def is_complete(self) -> bool:
        """Whether the last output of every sequence has been put."""
        return not self._num_unfinished

    def put(self, output: StepOutput) -> None:
        unread = self._unread.setdefault(output.index, output)
        if unread is not output:
            unread.merge(output)
        self._num_unfinished -= output.finish_reason is not None
        self._arrival.set()

    def fail(self, error: Exception) -> None:
        """Ends the reading with an exception."""
        self._error = error
        self._arrival.set()

    async def read(self) -> AsyncIterator[StepOutput]:
        """Outputs until every sequence has ended."""
        while True:
            await self._arrival.wait()
            self._arrival.clear()
            unread, self._unread = self._unread, {}
            for output in unread.values():
                yield output
            if self._error is not None:
                raise self._error
            if self.is_complete and not self._unread:
                return

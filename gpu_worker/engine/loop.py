"""The one thread that owns the engine and its device; coroutines talk to it by messages.

    coroutine:  generate() ── command ──► inbox ──►  thread:  take commands, Engine.step()
                Mailbox    ◄── call_soon_threadsafe ──  outputs, once a step

A request that cannot run fails alone. Whatever else a step raises is the failure of the device: all who wait
are told why, and so are all who ask from then on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from gpu_worker.engine.engine import Engine, EngineStats
from gpu_worker.engine.errors import EngineDeadError, EngineDrainingError, RequestError
from gpu_worker.engine.mailbox import Mailbox
from gpu_worker.engine.sequence import Request, StepOutput

_Result = TypeVar("_Result")

_SNAPSHOT_SECONDS = 0.05
_RATE_SECONDS = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadSnapshot:
    """How busy the engine is, at most a twentieth of a second ago."""

    num_running: int
    num_waiting: int
    num_used_blocks: int
    num_blocks: int
    num_pending_prefill_tokens: int
    generation_tokens_per_second: float
    is_draining: bool


@dataclass(frozen=True, slots=True)
class _Command:
    """What the thread is asked to do, and how to say that it cannot."""

    run: Callable[[], None]
    fail: Callable[[Exception], None]


class EngineLoop:
    """Runs an engine. `start` it once, `close` it at the end; the rest may be called from any event loop."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._inbox: SimpleQueue[_Command] = SimpleQueue()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._mailboxes: dict[str, Mailbox] = {}
        self._untold: list[StepOutput] = []
        self._idle_waiters: list[Callable[[], None]] = []
        self._is_closing = False
        self._is_draining = False
        self._failure: str | None = None
        self._busy_since: float | None = None
        self._stats = engine.stats()
        self._history: tuple[tuple[float, int], ...] = ((time.monotonic(), 0),)

    @property
    def failure(self) -> str | None:
        """Why the engine is dead, or None."""
        return self._failure

    @property
    def is_healthy(self) -> bool:
        return self._failure is None

    @property
    def silence_ms(self) -> int:
        """Milliseconds since the last step while there is work; 0 when idle."""
        since = self._busy_since
        return 0 if since is None else int((time.monotonic() - since) * 1e3)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; what still runs is dropped."""
        self._post(self._close, lambda error: self._close())
        self._thread.join()

    def stats(self) -> EngineStats:
        """The engine's state and totals, at most a twentieth of a second old."""
        return self._stats

    def load(self) -> LoadSnapshot:
        stats = self._stats
        return LoadSnapshot(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_used_blocks=stats.num_used_blocks,
            num_blocks=stats.num_blocks,
            num_pending_prefill_tokens=stats.num_pending_prefill_tokens,
            generation_tokens_per_second=self._generation_rate(),
            is_draining=self._is_draining,
        )

    async def generate(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Outputs of a request until all its sequences have ended. Closing the generator aborts it.

        Raises RequestError or ContextLengthError, EngineDrainingError, or EngineDeadError.
        """
        if self._is_draining:
            raise EngineDrainingError("the engine is draining and takes no new requests")
        if request.params.structured_output is not None:
            await asyncio.to_thread(self._engine.compile, request.params)
        mailbox = Mailbox(request.params.n)
        fail = _on_loop(mailbox.loop, mailbox.fail)
        self._post(lambda: self._add(request, mailbox, fail), fail)
        try:
            async for output in mailbox.read():
                yield output
        finally:
            if not mailbox.is_complete:
                self._post(lambda: self._withdraw(request.request_id, mailbox), lambda error: None)

    async def abort(self, request_id: str) -> bool:
        """Ends a request, whose reader gets a last output; False if there is none of that id."""
        return await self._call(lambda: self._engine.abort(request_id))

    async def drain(self, timeout_seconds: float | None = None) -> int:
        """Takes nothing new, waits for what runs, aborts what is left after the timeout; returns how many."""
        self._is_draining = True
        idle: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wake = _on_loop(idle.get_loop(), lambda: _resolve(idle, None))
        self._post(lambda: self._idle_waiters.append(wake), lambda error: wake())
        try:
            await asyncio.wait_for(idle, timeout_seconds)
        except TimeoutError:
            return await self._call(self._abort_all)
        return 0

    async def _call(self, function: Callable[[], _Result]) -> _Result:
        """Runs a function on the engine's thread."""
        result: asyncio.Future[_Result] = asyncio.get_running_loop().create_future()
        deliver = _on_loop(result.get_loop(), lambda value: _resolve(result, value))
        self._post(
            lambda: deliver(function()), _on_loop(result.get_loop(), lambda error: _reject(result, error))
        )
        return await result

    def _post(self, run: Callable[[], None], fail: Callable[[Exception], None]) -> None:
        self._inbox.put(_Command(run, fail))

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            logger.exception("the engine failed")
            self._die(f"the engine failed: {type(error).__name__}: {error}")
        while not self._is_closing:
            self._inbox.get().fail(EngineDeadError(self._failure))

    def _serve(self) -> None:
        while not self._is_closing:
            self._take_commands()
            if self._engine.has_work:
                self._untold = self._engine.step(meanwhile=self._tell)
                self._busy_since = time.monotonic()
            # With a GPU, telling waits until the next step runs there: readers that wake up take the
            # interpreter's lock, and would hold up its launch.
            if not (self._engine.config.overlap and self._engine.has_work):
                self._tell()
            self._publish()

    def _take_commands(self) -> None:
        """Runs what has come in; waits for something if there is nothing else to do."""
        if not self._engine.has_work:
            self._become_idle()
            self._take(self._inbox.get())
            self._busy_since = time.monotonic()
        while not self._inbox.empty():
            self._tell()
            self._take(self._inbox.get())

    def _take(self, command: _Command) -> None:
        command.run()
        # Before the next command: it may bring a new request under an id that has just ended.
        self._deliver(self._engine.take_outputs())

    def _become_idle(self) -> None:
        self._busy_since = None
        self._publish(is_final=True)
        for wake in self._idle_waiters:
            wake()
        self._idle_waiters.clear()

    def _add(self, request: Request, mailbox: Mailbox, fail: Callable[[Exception], None]) -> None:
        try:
            self._engine.add(request)
        except RequestError as error:
            fail(error)
        else:
            self._mailboxes[request.request_id] = mailbox

    def _withdraw(self, request_id: str, mailbox: Mailbox) -> None:
        """The reader has gone."""
        if self._mailboxes.get(request_id) is mailbox:
            del self._mailboxes[request_id]
            self._engine.abort(request_id)

    def _abort_all(self) -> int:
        return sum(self._engine.abort(request_id) for request_id in list(self._mailboxes))

    def _close(self) -> None:
        self._is_closing = True

    def _tell(self) -> None:
        """Delivers what the last step gave."""
        outputs, self._untold = self._untold, []
        self._deliver(outputs)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """Sends each output to its mailbox, with one wake-up for each event loop."""
        post: defaultdict[asyncio.AbstractEventLoop, list[tuple[Mailbox, StepOutput]]] = defaultdict(list)
        for output in outputs:
            mailbox = self._mailboxes.get(output.request_id)
            if mailbox is not None:
                post[mailbox.loop].append((mailbox, output))
        self._forget_finished(outputs)
        for loop, letters in post.items():
            _on_loop(loop, _put_all)(letters)

    def _forget_finished(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            if output.finish_reason is not None and not self._engine.is_live(output.request_id):
                self._mailboxes.pop(output.request_id, None)

    def _publish(self, *, is_final: bool = False) -> None:
        """Renews what other threads see of the engine."""
        now = time.monotonic()
        if is_final or now - self._history[-1][0] >= _SNAPSHOT_SECONDS:
            self._stats = self._engine.stats()
            recent = tuple(entry for entry in self._history if now - entry[0] < _RATE_SECONDS)
            self._history = (*recent, (now, self._stats.num_generation_tokens_total))

    def _generation_rate(self) -> float:
        """Tokens per second over the last seconds."""
        now, history = time.monotonic(), self._history
        recent = [entry for entry in history if now - entry[0] < _RATE_SECONDS]
        if not recent:
            return 0.0
        start, tokens = recent[0]
        return (history[-1][1] - tokens) / max(now - start, _SNAPSHOT_SECONDS)

    def _die(self, reason: str) -> None:
        self._tell()
        self._failure = reason
        self._busy_since = None
        for mailbox in self._mailboxes.values():
            _on_loop(mailbox.loop, mailbox.fail)(EngineDeadError(reason))
        for wake in self._idle_waiters:
            wake()


def _put_all(letters: list[tuple[Mailbox, StepOutput]]) -> None:
    for mailbox, output in letters:
        mailbox.put(output)


def _resolve(future: asyncio.Future[_Result], result: _Result) -> None:
    if not future.done():
        future.set_result(result)


def _reject(future: asyncio.Future[_Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., object]) -> Callable[..., None]:
    """The function, to be run on the event loop whoever calls; nothing happens when that loop is closed."""

    def call(*args: object) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(function, *args)

    return call

"""One choice as it grows: worker messages in, events out, text and tokens kept in step.

worker ──on_response──► ids ──push──► tokenizer ──on_piece──► events ──► reader
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence

from gateway.detokenize import DetokenizeSession, Piece, PieceSink
from gateway.requests import Event, Finished, Started, TextPiece
from protos.rpc.errors import ServiceError, UnavailableError
from protos.wint2.common.v1.common_pb2 import (
    FINISH_REASON_STOP,
    FinishReason,
    PositionLogprobs,
    SamplingParams,
    Timings,
    Usage,
)
from protos.wint2.worker.v1.worker_pb2 import Delta, Finish, GenerateResponse, PromptInfo


def stop_token_ids(params: SamplingParams, eos_token_ids: Sequence[int]) -> frozenset[int]:
    """Ids that end this completion."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_token_ids))


def worker_lost() -> ServiceError:
    message = "the worker ended the stream early"
    return UnavailableError(message, reason="WORKER_LOST", retry_after_seconds=1)


class Completion:
    """What arrives is passed on at once; the reader takes the events at its own pace.

    `unprinted` are tokens whose text is held back: half a character, or the start of a stop string.
    """

    def __init__(
        self,
        index: int,
        stop_ids: frozenset[int],
        open_session: Callable[[PieceSink], DetokenizeSession],
        *,
        include_stop: bool,
    ) -> None:
        self._index = index
        self._stop_ids = stop_ids
        self._include_stop = include_stop
        self._session = open_session(self)
        self._events: deque[Event] = deque()
        self._reader: asyncio.Future[None] | None = None
        self._error: ServiceError | None = None
        self._is_finished = False
        self._finish: Finish | None = None
        self._usage = Usage()
        self._unprinted: list[int] = []
        self._unprinted_logprobs: list[PositionLogprobs] = []
        self._num_printed = 0

    async def events(self) -> AsyncGenerator[Event]:
        """Up to Finished; raises what ended the completion if it did not end well."""
        while True:
            while self._events:
                yield self._take()
            if self._is_finished:
                return
            if self._error is not None and not self._session.is_waiting:
                raise self._error
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader

    def on_response(self, response: GenerateResponse) -> None:
        """The worker's next message."""
        if self._is_finished:
            return
        kind = response.WhichOneof("event")
        if kind == "delta":
            self._extend(response.delta)
        elif kind == "finish":
            self._finish = response.finish
            self._session.push((), end=True)
        else:
            self._tell(self._start(response.prompt_info))

    def on_end(self, error: ServiceError | None) -> None:
        """The worker says no more. What it said before is still told."""
        if self._finish is None and self._error is None:
            self._error = error or worker_lost()
            self._wake()

    def on_piece(self, piece: Piece) -> None:
        count = piece.num_tokens - self._num_printed
        token_ids, self._unprinted = self._unprinted[:count], self._unprinted[count:]
        logprobs, self._unprinted_logprobs = (
            self._unprinted_logprobs[:count],
            self._unprinted_logprobs[count:],
        )
        self._num_printed = piece.num_tokens
        if piece.text or token_ids:
            self._tell(TextPiece(self._index, piece.text, token_ids, logprobs))
        if piece.finished:
            self._is_finished = True
            self._tell(self._stopped(piece) if piece.HasField("matched_stop") else self._ended())
        elif self._error is not None:
            self._wake()

    def on_lost(self, error: ServiceError) -> None:
        self._error = self._error or error
        self._wake()

    def close(self) -> None:
        self._session.close()

    def _take(self) -> Event:
        """The next event; pieces that gathered while nobody read are put together."""
        event, events = self._events.popleft(), self._events
        if not isinstance(event, TextPiece) or not events:
            return event
        pieces = [event]
        while events and isinstance(events[0], TextPiece):
            pieces.append(events.popleft())  # type: ignore[arg-type]
        return event if len(pieces) == 1 else joined(pieces)

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _start(self, info: PromptInfo) -> Started:
        self._usage.prompt_tokens, self._usage.cached_tokens = info.prompt_tokens, info.cached_tokens
        return Started(self._index, info.prompt_tokens, info.cached_tokens, info.prompt_logprobs)

    def _extend(self, delta: Delta) -> None:
        token_ids = list(delta.token_ids)
        if token_ids and token_ids[-1] in self._stop_ids and not self._include_stop:
            token_ids.pop()  # it ends the text and is no part of it
        if not token_ids:
            return
        self._unprinted += token_ids
        self._unprinted_logprobs += delta.logprobs[: len(token_ids)]
        self._session.push(token_ids)

    def _ended(self) -> Finished:
        finish = self._finish or Finish()
        stop_token = finish.stop_token_id if finish.HasField("stop_token_id") else None
        return Finished(self._index, finish.reason, finish.usage, finish.timings, stop_token_id=stop_token)

    def _stopped(self, piece: Piece) -> Finished:
        """A stop string ends the completion here; what the worker drew beyond it does not count."""
        self._usage.completion_tokens = piece.num_tokens
        reason: FinishReason.ValueType = FINISH_REASON_STOP
        return Finished(self._index, reason, self._usage, Timings(), matched_stop=piece.matched_stop)


def joined(pieces: Sequence[TextPiece]) -> TextPiece:
    return TextPiece(
        pieces[0].index,
        "".join(piece.text for piece in pieces),
        [token_id for piece in pieces for token_id in piece.token_ids],
        [position for piece in pieces for position in piece.logprobs],
    )

"""One choice as it grows: worker messages in, events out, text and tokens kept in step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.detokenize import DetokenizeSession, Piece
from gateway.requests import Event, Finished, Started, TextPiece
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


@dataclass(slots=True)
class Completion:
    """`unprinted` are tokens whose text is held back: half a character, or the start of a stop string."""

    index: int
    session: DetokenizeSession
    stop_ids: frozenset[int]
    include_stop: bool
    is_finished: bool = False
    usage: Usage = field(default_factory=Usage)
    unprinted: list[int] = field(default_factory=list)
    unprinted_logprobs: list[PositionLogprobs] = field(default_factory=list)
    num_printed: int = 0

    async def feed(self, response: GenerateResponse) -> list[Event]:
        """What the worker's message means for the client."""
        kind = response.WhichOneof("event")
        if kind == "delta":
            return await self._extend(response.delta)
        if kind == "finish":
            return await self._finish(response.finish)
        return [self._start(response.prompt_info)]

    def _start(self, info: PromptInfo) -> Started:
        self.usage.prompt_tokens, self.usage.cached_tokens = info.prompt_tokens, info.cached_tokens
        return Started(self.index, info.prompt_tokens, info.cached_tokens, info.prompt_logprobs)

    async def _extend(self, delta: Delta) -> list[Event]:
        token_ids = list(delta.token_ids)
        if token_ids and token_ids[-1] in self.stop_ids and not self.include_stop:
            token_ids.pop()  # it ends the text and is no part of it
        self.unprinted += token_ids
        self.unprinted_logprobs += delta.logprobs[: len(token_ids)]
        if not token_ids:
            return []
        piece = await self.session.push(token_ids)
        return self._print(piece)

    async def _finish(self, finish: Finish) -> list[Event]:
        piece = await self.session.push((), end=True)
        stop_token = finish.stop_token_id if finish.HasField("stop_token_id") else None
        events = self._print(piece)
        if not self.is_finished:
            self.is_finished = True
            events.append(
                Finished(self.index, finish.reason, finish.usage, finish.timings, stop_token_id=stop_token)
            )
        return events

    def _print(self, piece: Piece) -> list[Event]:
        events: list[Event] = []
        count = piece.num_tokens - self.num_printed
        token_ids, self.unprinted = self.unprinted[:count], self.unprinted[count:]
        logprobs, self.unprinted_logprobs = self.unprinted_logprobs[:count], self.unprinted_logprobs[count:]
        self.num_printed = piece.num_tokens
        if piece.text or token_ids:
            events.append(TextPiece(self.index, piece.text, token_ids, logprobs))
        if piece.HasField("matched_stop"):
            events.append(self._stop(piece))
        return events

    def _stop(self, piece: Piece) -> Finished:
        """A stop string ends the completion here; what the worker drew beyond it does not count."""
        self.is_finished = True
        self.usage.completion_tokens = piece.num_tokens
        reason: FinishReason.ValueType = FINISH_REASON_STOP
        return Finished(self.index, reason, self.usage, Timings(), matched_stop=piece.matched_stop)

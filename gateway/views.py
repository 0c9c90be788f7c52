"""A pipeline's events as OpenAI's choices: piece by piece for a stream, folded for a single answer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from gateway.logprobs import position_table
from gateway.requests import EncodedPrompt, Event, Finished, Started, TextPiece, TextRequest
from gateway.responses import FinishReasonName, UsageBody
from gateway.schemas import CommonRequest
from protos.wint2.common.v1 import common_pb2
from protos.wint2.common.v1.common_pb2 import PositionLogprobs

Json = dict[str, Any]
TokenTexts = Callable[[Iterable[int]], Awaitable[dict[int, str]]]

FINISH_REASONS: dict[common_pb2.FinishReason.ValueType, FinishReasonName] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_ABORTED: "abort",
}


class Tally:
    """The usage so far of all choices."""

    def __init__(self, prompts: Sequence[EncodedPrompt], num_choices: int) -> None:
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._num_choices = num_choices
        self._cached: dict[int, int] = {}
        self._completion: dict[int, int] = {}

    @property
    def num_completion_tokens(self) -> int:
        return sum(self._completion.values())

    def on_event(self, event: Event) -> None:
        if isinstance(event, TextPiece):
            self._completion[event.index] = self._completion.get(event.index, 0) + len(event.token_ids)
        elif isinstance(event, Finished):
            self._completion[event.index] = event.usage.completion_tokens
        elif event.index % self._num_choices == 0:
            self._cached[event.index] = event.num_cached_tokens

    def body(self) -> UsageBody:
        completion_tokens = self.num_completion_tokens
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._num_prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


@dataclass
class Folded:
    """A choice put together from its events."""

    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None

    def on_event(self, event: Event) -> None:
        if isinstance(event, TextPiece):
            self.text.append(event.text)
            self.token_ids += event.token_ids
            self.logprobs += event.logprobs
        elif isinstance(event, Finished):
            self.finished = event
        else:
            self.started = event


class View:
    """One answer. Subclasses say how a choice looks; `head` is what all chunks and the answer begin with."""

    chunk_object: ClassVar[str]
    answer_object: ClassVar[str]

    def __init__(
        self,
        body: CommonRequest,
        request: TextRequest,
        prompts: Sequence[EncodedPrompt],
        model: str,
        token_texts: TokenTexts,
    ) -> None:
        self.body = body
        self.request = request
        self.prompts = prompts
        self.tally = Tally(prompts, request.num_choices)
        self.head: Json = {"id": request.request_id, "created": int(time.time()), "model": model}
        self.head["system_fingerprint"] = None
        self._token_texts = token_texts
        self._user_stop_ids = frozenset(request.sampling_params.stop_token_ids)

    async def chunk_choice(self, event: Event) -> Json | None:
        """The event as a choice of a chunk; None if the client has no need of it."""
        if isinstance(event, Started):
            return await self._opening(event)
        if isinstance(event, Finished):
            return self._choice(event.index, self._last_delta(event.index), None) | self._ending(event)
        delta = self._delta(event.index, event.text)
        if not (delta or event.logprobs or self.body.return_token_ids):
            return None
        logprobs = await self._logprobs(event.index, event.logprobs)
        choice = self._choice(event.index, delta or self._no_delta, logprobs)
        return choice | self._ids(event.token_ids)

    async def answer_choice(self, index: int, folded: Folded) -> Json:
        """The whole choice."""
        raise NotImplementedError

    def prompt_ids(self) -> Json:
        """What an answer says of its prompt."""
        return {}

    async def prompt_facts(self, folded: Folded) -> Json:
        """What a single answer says of its prompt as a whole."""
        return {}

    async def _prompt_logprobs(self, folded: Folded) -> Json:
        """The prompt's log-probabilities if they were asked for by name: one entry a token, none at first."""
        if self.body.prompt_logprobs is None or folded.started is None:
            return {}
        positions = folded.started.prompt_logprobs
        texts = await self._texts_of(positions)
        return {"prompt_logprobs": [None, *(position_table(position, texts) for position in positions)]}

    @property
    def _no_delta(self) -> Json:
        raise NotImplementedError

    async def _opening(self, event: Started) -> Json | None:
        raise NotImplementedError

    def _delta(self, index: int, text: str) -> Json:
        raise NotImplementedError

    def _last_delta(self, index: int) -> Json:
        raise NotImplementedError

    def _format(self, index: int, logprobs: Sequence[PositionLogprobs], texts: dict[int, str]) -> Json:
        raise NotImplementedError

    def _choice(self, index: int, content: Json, logprobs: Json | None) -> Json:
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": None}

    def _ending(self, event: Finished) -> Json:
        is_own = event.stop_token_id in self._user_stop_ids
        stop_reason = event.stop_token_id if is_own else event.matched_stop
        return {"finish_reason": FINISH_REASONS.get(event.reason, "stop"), "stop_reason": stop_reason}

    def _ids(self, token_ids: Sequence[int]) -> Json:
        return {"token_ids": list(token_ids)} if self.body.return_token_ids else {}

    async def _logprobs(self, index: int, logprobs: Sequence[PositionLogprobs]) -> Json | None:
        return self._format(index, logprobs, await self._texts_of(logprobs)) if logprobs else None

    async def _texts_of(self, logprobs: Iterable[PositionLogprobs], *token_ids: int) -> dict[int, str]:
        candidates = (entry.token_id for position in logprobs for entry in (position.sampled, *position.top))
        return await self._token_texts((*candidates, *token_ids))

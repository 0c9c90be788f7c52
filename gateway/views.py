"""A pipeline's events as OpenAI's choices: piece by piece for a stream, folded for a single answer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.requests import EncodedPrompt, Event, Finished, Started, TextPiece, TextRequest
from gateway.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    FinishReasonName,
    LogprobEntry,
    TokenEntry,
    UsageBody,
)
from gateway.schemas import CommonRequest, CompletionRequest
from protos.wint2.common.v1 import common_pb2
from protos.wint2.common.v1.common_pb2 import PositionLogprobs, TokenLogprob

Json = dict[str, Any]
TokenTexts = Callable[[Iterable[int]], Awaitable[dict[int, str]]]

FINISH_REASONS: dict[common_pb2.FinishReason.ValueType, FinishReasonName] = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_ABORTED: "abort",
}
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


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
    finished: Finished | None = None

    def on_event(self, event: Event) -> None:
        if isinstance(event, TextPiece):
            self.text.append(event.text)
            self.token_ids += event.token_ids
            self.logprobs += event.logprobs
        elif isinstance(event, Finished):
            self.finished = event


class View:
    """One answer. Subclasses say how a choice looks; `head` is what all chunks and the answer begin with."""

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
            return self._opening(event)
        if isinstance(event, Finished):
            return self._choice(event.index, self._delta(None), None) | self._ending(event)
        if not (event.text or event.logprobs or self.body.return_token_ids):
            return None
        logprobs = await self._logprobs(event.index, event.logprobs)
        choice = self._choice(event.index, self._delta(event.text), logprobs)
        return choice | self._ids(event.token_ids)

    async def answer_choice(self, index: int, folded: Folded) -> Json:
        """The whole choice."""
        assert folded.finished is not None
        content = self._whole(index, "".join(folded.text))
        choice = self._choice(index, content, await self._logprobs(index, folded.logprobs))
        return choice | self._ending(folded.finished) | self._ids(folded.token_ids)

    def _opening(self, event: Started) -> Json | None:
        raise NotImplementedError

    def _delta(self, text: str | None) -> Json:
        raise NotImplementedError

    def _whole(self, index: int, text: str) -> Json:
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
        if not logprobs:
            return None
        texts = await self._token_texts(
            entry.token_id for position in logprobs for entry in (position.sampled, *position.top)
        )
        return self._format(index, logprobs, texts)


class ChatView(View):
    """The answers of /v1/chat/completions."""

    chunk_object = "chat.completion.chunk"
    answer_object = "chat.completion"

    def prompt_ids(self) -> Json:
        return {"prompt_token_ids": list(self.prompts[0].token_ids)} if self.body.return_token_ids else {}

    def _opening(self, event: Started) -> Json:
        return self._choice(event.index, {"delta": {"role": "assistant", "content": ""}}, None)

    def _delta(self, text: str | None) -> Json:
        return {"delta": {} if text is None else {"content": text}}

    def _whole(self, index: int, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _format(self, index: int, logprobs: Sequence[PositionLogprobs], texts: dict[int, str]) -> Json:
        content = [logprob_entry(position, texts) for position in logprobs]
        body: ChatLogprobs = {"content": content}
        return dict(body)


class TextView(View):
    """The answers of /v1/completions; `echoes` are the texts that the completions begin with."""

    chunk_object = "text_completion"
    answer_object = "text_completion"
    body: CompletionRequest

    def __init__(self, *args: Any, echoes: Sequence[str] = ()) -> None:
        super().__init__(*args)
        self._echoes = echoes
        self._offsets: dict[int, int] = {}

    def prompt_ids(self) -> Json:
        return {}

    def _opening(self, event: Started) -> Json | None:
        prompt = event.index // self.request.num_choices
        if not self._echoes and not self.body.return_token_ids:
            return None
        choice = self._choice(event.index, {"text": self._echoes[prompt] if self._echoes else ""}, None)
        return choice | self._prompt_token_ids(event.index) | self._ids(())

    def _delta(self, text: str | None) -> Json:
        return {"text": text or ""}

    def _whole(self, index: int, text: str) -> Json:
        echo = self._echoes[index // self.request.num_choices] if self._echoes else ""
        return {"text": echo + text} | self._prompt_token_ids(index)

    def _prompt_token_ids(self, index: int) -> Json:
        prompt = self.prompts[index // self.request.num_choices]
        return {"prompt_token_ids": list(prompt.token_ids)} if self.body.return_token_ids else {}

    def _format(self, index: int, logprobs: Sequence[PositionLogprobs], texts: dict[int, str]) -> Json:
        body, self._offsets[index] = text_logprobs(logprobs, texts, self._offsets.get(index, 0))
        return dict(body)


def logprob_entry(position: PositionLogprobs, texts: dict[int, str]) -> LogprobEntry:
    sampled = token_entry(position.sampled, texts)
    return {**sampled, "top_logprobs": [token_entry(candidate, texts) for candidate in position.top]}


def token_entry(candidate: TokenLogprob, texts: dict[int, str]) -> TokenEntry:
    text = texts[candidate.token_id]
    is_whole = REPLACEMENT not in text  # a token that is part of a character has no text of its own
    return {
        "token": text,
        "logprob": candidate.logprob,
        "bytes": list(text.encode()) if is_whole else None,
    }


def text_logprobs(
    logprobs: Sequence[PositionLogprobs], texts: dict[int, str], offset: int
) -> tuple[CompletionLogprobs, int]:
    """The older API's parallel lists, beginning at `offset` of the text; and where they end."""
    body: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for position in logprobs:
        token = texts[position.sampled.token_id]
        body["tokens"].append(token)
        body["token_logprobs"].append(position.sampled.logprob)
        candidates = (*position.top, position.sampled)
        body["top_logprobs"].append({texts[entry.token_id]: entry.logprob for entry in candidates})
        body["text_offset"].append(offset)
        offset += len(token)
    return body, offset

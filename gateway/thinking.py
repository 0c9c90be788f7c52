"""A limit on how long a model may think: there its thinking is closed for it, and the answer goes on.

prompt ──► <think> up to the limit ── still thinking? ──► … </think> put behind it ──► the rest, as a prompt's
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from gateway.chat_parser import END_THINK, THINK
from gateway.chat_schemas import ChatCompletionRequest
from gateway.clients import TokenizerClient
from gateway.requests import EncodedPrompt, Event, Finished, TextPiece, ThinkingLimit
from protos.rpc.errors import InvalidArgumentError
from protos.wint2.common.v1.common_pb2 import FINISH_REASON_LENGTH, Usage
from protos.wint2.worker.v1.worker_pb2 import GenerateRequest

Attempt = Callable[[GenerateRequest], AsyncGenerator[Event]]


async def thinking_limit(
    body: ChatCompletionRequest, prompt: EncodedPrompt, template: str, tokenizer: TokenizerClient
) -> ThinkingLimit | None:
    """What the request says of it. InvalidArgumentError if the model's template knows no thinking."""
    if body.thinking_field is None:
        return None
    if END_THINK not in template:
        message = "the model's chat template knows no thinking"
        raise InvalidArgumentError(message, field=body.thinking_field, reason="UNSUPPORTED_PARAMETER")
    [end] = await tokenizer.encode(
        [END_THINK], add_special_tokens=False, parse_special_tokens=True, timeout=10
    )
    num_tokens = body.thinking_token_budget or body.reasoning_max_tokens or 0
    return ThinkingLimit(num_tokens, (prompt.text or "").rstrip().endswith(THINK), end)


@dataclass
class Thought:
    """The completion up to the limit. `cut` is how it ended if it was the limit that ended it."""

    is_open: bool
    is_limited: bool
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cut: Finished | None = None

    @property
    def is_going_on(self) -> bool:
        return (self.is_open or THINK in self.text) and END_THINK not in self.text

    def note(self, event: Event) -> None:
        if isinstance(event, TextPiece):
            self.text += event.text
            self.token_ids += event.token_ids
        elif isinstance(event, Finished) and self.is_limited and event.reason == FINISH_REASON_LENGTH:
            self.cut = event


async def in_two_parts(
    attempt: Attempt, generate: GenerateRequest, limit: ThinkingLimit
) -> AsyncGenerator[Event]:
    """The events of one completion, of which the part behind the limit is a request of its own."""
    first = first_part(generate, limit.num_tokens)
    thought = Thought(limit.is_open, is_limited=first.sampling_params != generate.sampling_params)
    async with aclosing(attempt(first)) as events:
        async for event in events:
            thought.note(event)
            if thought.cut is None:
                yield event
    if thought.cut is not None:
        async with aclosing(the_rest(attempt, generate, limit, thought, thought.cut)) as events:
            async for event in events:
                yield event


async def the_rest(
    attempt: Attempt, generate: GenerateRequest, limit: ThinkingLimit, thought: Thought, cut: Finished
) -> AsyncGenerator[Event]:
    """What follows the limit: thinking that goes on is closed first."""
    end_token_ids = limit.end_token_ids if thought.is_going_on else ()
    before = [*thought.token_ids, *end_token_ids]
    second = second_part(generate, before)
    if second is None:
        yield cut
        return
    if end_token_ids:
        yield TextPiece(cut.index, END_THINK, end_token_ids)
    async with aclosing(attempt(second)) as events:
        async for event in events:
            if isinstance(event, Finished):
                yield behind(event, cut.usage, len(before))
            elif isinstance(event, TextPiece):
                yield event


def first_part(generate: GenerateRequest, num_tokens: int) -> GenerateRequest:
    """The request itself if it is no longer than the limit."""
    first = GenerateRequest()
    first.CopyFrom(generate)
    params = first.sampling_params
    if not params.HasField("max_tokens") or params.max_tokens > num_tokens:
        params.max_tokens = num_tokens
        if params.HasField("min_tokens"):
            params.min_tokens = min(params.min_tokens, num_tokens)
    return first


def second_part(generate: GenerateRequest, before: Sequence[int]) -> GenerateRequest | None:
    """What is left of the request behind these tokens, if anything is."""
    second = GenerateRequest()
    second.CopyFrom(generate)
    second.prompt.ids.extend(before)
    params = second.sampling_params
    params.ClearField("prompt_logprobs")
    if params.HasField("min_tokens"):
        params.min_tokens = max(0, params.min_tokens - len(before))
    if params.HasField("max_tokens"):
        params.max_tokens = max(0, params.max_tokens - len(before))
    return None if params.HasField("max_tokens") and not params.max_tokens else second


def behind(end: Finished, first: Usage, num_tokens: int) -> Finished:
    """The usage of both parts as one completion of the prompt."""
    usage = Usage(
        prompt_tokens=first.prompt_tokens,
        cached_tokens=first.cached_tokens,
        completion_tokens=num_tokens + end.usage.completion_tokens,
    )
    return replace(end, usage=usage)

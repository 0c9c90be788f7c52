"""A request in the gateway's own words, the same from HTTP and gRPC, and the events that answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from protos.wint2.common.v1.common_pb2 import FinishReason, PositionLogprobs, SamplingParams, Timings, Usage
from protos.wint2.tokenizer.v1.tokenizer_pb2 import ApplyChatTemplateRequest

Prompt = str | Sequence[int] | ApplyChatTemplateRequest


@dataclass(frozen=True)
class Limits:
    """What a request may ask for on this server."""

    max_choices: int = 128
    trust_request_chat_template: bool = False


@dataclass(frozen=True, slots=True)
class ThinkingLimit:
    """How long a model may think. `is_open`: the prompt ends inside of <think>; `end_token_ids` close it."""

    num_tokens: int
    is_open: bool
    end_token_ids: Sequence[int]


@dataclass(frozen=True)
class TextRequest:
    """What a client asks for. `deadline` is a time of `time.monotonic`, in seconds.

    Each prompt is completed `num_choices` times; choice j of prompt i has the index i * num_choices + j.
    """

    request_id: str
    model: str
    prompts: Sequence[Prompt]
    deadline: float
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    num_choices: int = 1
    stop: Sequence[str] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    priority: int = 0
    cache_salt: str | None = None
    bad_words: Sequence[str] = ()
    thinking: ThinkingLimit | None = None


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's ids; `text` is what they were made from, if it was text."""

    token_ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """A worker has taken up the prompt. `prompt_logprobs` begin with its second token."""

    index: int
    num_prompt_tokens: int
    num_cached_tokens: int
    prompt_logprobs: Sequence[PositionLogprobs] = ()


@dataclass(frozen=True, slots=True)
class TextPiece:
    """New text, the tokens it stands for, and a logprobs entry for each if they were asked for."""

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[PositionLogprobs] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a choice."""

    index: int
    reason: FinishReason.ValueType
    usage: Usage
    timings: Timings
    matched_stop: str | None = None
    stop_token_id: int | None = None


Event = Started | TextPiece | Finished

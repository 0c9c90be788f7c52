"""The answers of OpenAI's API as they go over the wire; fields that OpenAI does not have are "ours"."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # pydantic reads typing's own only from Python 3.12 on

FinishReasonName = Literal["stop", "length", "tool_calls", "abort"]


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class UsageBody(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenEntry(TypedDict):
    token: str
    logprob: float
    bytes: list[int] | None


class LogprobEntry(TokenEntry):
    top_logprobs: list[TokenEntry]


class ChatLogprobs(TypedDict):
    content: list[LogprobEntry]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]  # None: nothing comes before a prompt's first token
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CalledFunction(TypedDict):
    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class CalledFunctionDelta(TypedDict):
    name: NotRequired[str]  # in a call's first piece
    arguments: str  # the next piece of the text


class ToolCallDelta(TypedDict):
    index: int
    id: NotRequired[str]  # in a call's first piece, and so the type
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class AnswerMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str | None]  # of models that think
    tool_calls: NotRequired[list[ToolCall]]


class Delta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class Choice(TypedDict):
    index: int
    finish_reason: FinishReasonName | None
    stop_reason: NotRequired[str | int | None]  # ours (and vLLM's): the stop string or token that ended it
    token_ids: NotRequired[list[int]]  # ours, by return_token_ids


class ChatChoice(Choice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(Choice):
    delta: Delta
    logprobs: ChatLogprobs | None


class TextChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: NotRequired[PromptLogprobs]  # vLLM's, by prompt_logprobs
    prompt_token_ids: NotRequired[list[int]]  # ours, by return_token_ids


class Answer(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str | None


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_logprobs: NotRequired[PromptLogprobs]  # vLLM's, by prompt_logprobs
    prompt_token_ids: NotRequired[list[int]]  # ours, by return_token_ids


class ChatCompletionChunk(Answer):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[UsageBody | None]
    prompt_token_ids: NotRequired[list[int]]


class TextCompletion(Answer):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: NotRequired[UsageBody | None]


class ModelBody(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int  # ours, and so the rest
    num_workers: int
    quantization: str


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[ModelBody]


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(TypedDict):
    error: ErrorDetail


class Health(TypedDict):
    status: Literal["ready", "not ready"]
    reasons: list[str]


class Liveness(TypedDict):
    status: Literal["alive"]


class Version(TypedDict):
    version: str

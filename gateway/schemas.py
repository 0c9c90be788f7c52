"""The requests of OpenAI's API, field by field: honoured, passed over as documented, or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from gateway.fields import (
    INT32_MAX,
    INT64_MAX,
    UINT32_MAX,
    LogitBias,
    NonEmpty,
    Prompt,
    Stop,
    TokenId,
    described_as,
    only_neutral,
    shallow,
)


class Schema(BaseModel):
    """Types are not converted, unknown fields are refused, null means absent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Empty = Annotated[list[JsonValue], Field(max_length=0)]


class StreamOptions(Schema):
    include_usage: bool | None = Field(
        None, description="Last, a chunk without choices that tells the usage."
    )
    continuous_usage_stats: bool | None = Field(None, description="Every chunk tells the usage so far.")
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is padded.")


class TextPart(Schema):
    type: Literal["text"]
    text: str


class TextFormat(Schema):
    type: Literal["text"]


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description='"developer" is read as "system".'
    )
    content: Annotated[str | list[TextPart], described_as('a string or a list of parts of the type "text"')]
    name: str | None = Field(None, description="Passed to the chat template.")
    reasoning_content: str | None = Field(None, description="Passed to the chat template.")
    # What clients send back with an answer they got: empty, since this server never fills them.
    refusal: Annotated[None, only_neutral("null")] = None
    audio: Annotated[None, only_neutral("null")] = None
    function_call: Annotated[None, only_neutral("null")] = None
    tool_calls: Annotated[Empty | None, only_neutral("[]")] = None
    annotations: Annotated[Empty | None, only_neutral("[]")] = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class CommonRequest(Schema):
    """What chat and completions share."""

    model: str | None = Field(None, description="A name from /v1/models; may be left out if there is one.")
    # Sampling
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy. Default 1.")
    top_p: float | None = Field(None, ge=0, le=1, description="0 is greedy. Default 1.")
    top_k: int | None = Field(None, ge=-1, le=UINT32_MAX, description="0 or -1: all. Default 0.")
    min_p: float | None = Field(None, ge=0, le=1, description="Default 0.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="Default 0.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="Default 0.")
    repetition_penalty: float | None = Field(None, gt=0, le=2, description="Default 1.")
    logit_bias: LogitBias | None = Field(None, description="Token id to bias.")
    seed: int | None = Field(
        None, ge=-INT64_MAX - 1, le=INT64_MAX, description="Same seed, same answer, whatever else runs."
    )
    n: int | None = Field(None, ge=1, le=128, description="Completions a prompt. Default 1.")
    # Length and end
    max_tokens: int | None = Field(None, ge=1, le=UINT32_MAX, description="Longest completion, in tokens.")
    min_tokens: int | None = Field(None, ge=0, le=UINT32_MAX, description="No end before. Default 0.")
    stop: Stop | None = Field(None, description="The completion ends before the first of these.")
    stop_token_ids: list[TokenId] | None = Field(
        None, max_length=64, description="Further tokens that end the completion."
    )
    ignore_eos: bool | None = Field(None, description="Go on past the end-of-sequence token.")
    include_stop_str_in_output: bool | None = Field(None, description="Keep the stop string.")
    # Form of the answer
    stream: bool | None = Field(None, description="Server-sent events, ended by [DONE].")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    skip_special_tokens: bool | None = Field(None, description="Leave them out of the text. Default true.")
    return_token_ids: bool | None = Field(None, description="Tell the ids of prompt and completion.")
    # Scheduling
    priority: int | None = Field(None, ge=-INT32_MAX - 1, le=INT32_MAX, description="Lower runs first.")
    cache_salt: NonEmpty | None = Field(None, description="Prefixes are shared only under equal salts.")
    # Passed over, as documented
    user: str | None = Field(None, description="Accepted; not used.")
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Accepted; not stored.")
    # Known, and only possible with the value that asks for nothing
    best_of: Annotated[Literal[1] | None, only_neutral("1")] = None
    use_beam_search: Annotated[Literal[False] | None, only_neutral("false")] = None
    prompt_logprobs: Annotated[Literal[0] | None, only_neutral("0")] = None
    bad_words: Annotated[Empty | None, only_neutral("[]")] = None
    allowed_token_ids: Annotated[Empty | None, only_neutral("[]")] = None
    logits_processors: Annotated[Empty | None, only_neutral("[]")] = None
    guided_json: Annotated[None, only_neutral("null")] = None
    guided_regex: Annotated[None, only_neutral("null")] = None
    guided_choice: Annotated[None, only_neutral("null")] = None
    guided_grammar: Annotated[None, only_neutral("null")] = None
    structured_outputs: Annotated[None, only_neutral("null")] = None
    truncate_prompt_tokens: Annotated[None, only_neutral("null")] = None

    @model_validator(mode="after")
    def _options_belong_to_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise misplaced("stream_options", "is only allowed when stream is true")
        return self

    @model_validator(mode="after")
    def _least_is_not_more_than_most(self) -> Self:
        most = self.longest_completion
        if most is not None and self.min_tokens is not None and self.min_tokens > most:
            raise misplaced("min_tokens", f"is {self.min_tokens}, more than the {most} of max_tokens")
        return self

    @property
    def longest_completion(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report at each position; None reports no probabilities at all."""
        raise NotImplementedError


class ChatCompletionRequest(CommonRequest):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=UINT32_MAX, description="Goes before max_tokens. Default: what the context leaves."
    )
    logprobs: bool | None = Field(None, description="Tell each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Likeliest tokens at each position.")
    chat_template_kwargs: Annotated[dict[str, JsonValue], AfterValidator(shallow)] | None = Field(
        None, description="Further variables for the chat template."
    )
    chat_template: NonEmpty | None = Field(
        None, description="A Jinja template in place of the model's, if the server allows it."
    )
    add_generation_prompt: bool | None = Field(None, description="Open the assistant's turn. Default true.")
    # Passed over, as documented
    safety_identifier: str | None = Field(None, description="Accepted; not used.")
    prompt_cache_key: str | None = Field(None, description="Accepted; prefixes are found by content.")
    # Known, and only possible with the value that asks for nothing
    tools: Annotated[Empty | None, only_neutral("[]")] = None
    tool_choice: Annotated[Literal["none", "auto"] | None, only_neutral('"none"')] = None
    parallel_tool_calls: bool | None = Field(None, description="Accepted; there are no tools.")
    functions: Annotated[Empty | None, only_neutral("[]")] = None
    function_call: Annotated[Literal["none", "auto"] | None, only_neutral('"none"')] = None
    response_format: Annotated[TextFormat | None, only_neutral('{"type": "text"}')] = None
    modalities: Annotated[list[Literal["text"]] | None, only_neutral('["text"]')] = None
    audio: Annotated[None, only_neutral("null")] = None
    prediction: Annotated[None, only_neutral("null")] = None
    reasoning_effort: Annotated[None, only_neutral("null")] = None
    verbosity: Annotated[None, only_neutral("null")] = None
    web_search_options: Annotated[None, only_neutral("null")] = None
    store: Annotated[Literal[False] | None, only_neutral("false")] = None
    service_tier: Annotated[Literal["auto", "default"] | None, only_neutral('"auto"')] = None
    echo: Annotated[Literal[False] | None, only_neutral("false")] = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise misplaced("top_logprobs", "is only allowed when logprobs is true")
        return self

    @property
    def longest_completion(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(CommonRequest):
    """POST /v1/completions"""

    DEFAULT_MAX_TOKENS: ClassVar[int] = 16  # OpenAI's

    prompt: Prompt = Field(description="Text or token ids, one or several.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Likeliest tokens at each position.")
    echo: bool | None = Field(None, description="Begin the text with the prompt; not with logprobs.")
    add_special_tokens: bool | None = Field(None, description="For prompts of text. Default true.")
    suffix: Annotated[Literal[""] | None, only_neutral("an empty string")] = None

    @model_validator(mode="after")
    def _prompt_has_no_logprobs(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise misplaced("echo", "is not supported together with logprobs: prompts are not scored")
        return self

    @property
    def longest_completion(self) -> int | None:
        return self.DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def misplaced(param: str, message: str) -> PydanticCustomError:
    """An error about one field found while looking at all of them."""
    details: dict[str, Any] = {"param": param}
    return PydanticCustomError("misplaced", message, details)

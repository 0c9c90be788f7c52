"""The requests of OpenAI's API, field by field: honoured, passed over as documented, or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from gateway.fields import (
    INT32_MAX,
    INT64_MAX,
    UINT32_MAX,
    LogitBias,
    NonEmpty,
    Prompt,
    SchemaOrText,
    Stop,
    TokenId,
    only_neutral,
)


class Schema(BaseModel):
    """Types are not converted, unknown fields are refused, null means absent."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, serialize_by_alias=True
    )


Empty = Annotated[list[JsonValue], Field(max_length=0)]
Choices = Annotated[list[NonEmpty], Field(min_length=1, max_length=1024)]
# Fields that say what a completion must look like.
STRUCTURED = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")


class StreamOptions(Schema):
    include_usage: bool | None = Field(
        None, description="Last, a chunk without choices that tells the usage."
    )
    continuous_usage_stats: bool | None = Field(None, description="Every chunk tells the usage so far.")
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is padded.")


class StructuredOutputs(Schema):
    """vLLM's way to say what a text must look like: exactly one of these."""

    json_schema: SchemaOrText | None = Field(None, alias="json", description="JSON Schema, or its text.")
    regex: NonEmpty | None = None
    choice: Choices | None = None
    grammar: NonEmpty | None = Field(None, description="Lark's notation or GBNF.")
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise misplaced("", "must have exactly one of json, regex, choice, grammar and json_object")
        return self


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
    bad_words: list[NonEmpty] | None = Field(None, max_length=64, description="Texts that must not occur.")
    allowed_token_ids: list[TokenId] | None = Field(
        None, max_length=4096, description="The completion is made of these tokens only."
    )
    # Form of the completion, at most one of
    structured_outputs: StructuredOutputs | None = Field(None, description="What it must look like.")
    guided_json: SchemaOrText | None = Field(None, description="structured_outputs.json")
    guided_regex: NonEmpty | None = Field(None, description="structured_outputs.regex")
    guided_choice: Choices | None = Field(None, description="structured_outputs.choice")
    guided_grammar: NonEmpty | None = Field(None, description="structured_outputs.grammar")
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
    prompt_logprobs: int | None = Field(
        None, ge=0, le=20, description="Likeliest tokens at each position of the prompt; not with stream."
    )
    # Scheduling
    priority: int | None = Field(None, ge=-INT32_MAX - 1, le=INT32_MAX, description="Lower runs first.")
    cache_salt: NonEmpty | None = Field(None, description="Prefixes are shared only under equal salts.")
    # Passed over, as documented
    user: str | None = Field(None, description="Accepted; not used.")
    metadata: dict[str, str] | None = Field(None, max_length=16, description="Accepted; not stored.")
    # Known, and only possible with the value that asks for nothing
    best_of: Annotated[Literal[1] | None, only_neutral("1")] = None
    use_beam_search: Annotated[Literal[False] | None, only_neutral("false")] = None
    length_penalty: Annotated[Annotated[float, Field(ge=1, le=1)] | None, only_neutral("1")] = None
    early_stopping: Annotated[Literal[False] | None, only_neutral("false")] = None
    detokenize: Annotated[Literal[True] | None, only_neutral("true")] = None
    spaces_between_special_tokens: Annotated[Literal[True] | None, only_neutral("true")] = None
    guided_decoding_backend: Annotated[None, only_neutral("null")] = None
    guided_whitespace_pattern: Annotated[None, only_neutral("null")] = None
    logits_processors: Annotated[Empty | None, only_neutral("[]")] = None
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

    @model_validator(mode="after")
    def _one_structure_at_most(self) -> Self:
        given = [name for name in STRUCTURED if getattr(self, name) is not None]
        if len(given) > 1:
            raise misplaced(given[1], f"cannot be combined with {given[0]}")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_are_not_streamed(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise misplaced("prompt_logprobs", "is not supported together with stream")
        return self

    @property
    def structured_field(self) -> str | None:
        """Name of the field that says what the completion must look like."""
        return next((name for name in STRUCTURED if getattr(self, name) is not None), None)

    @property
    def longest_completion(self) -> int | None:
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to report at each position; None reports no probabilities at all."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same for the positions of the prompt."""
        return self.prompt_logprobs


class CompletionRequest(CommonRequest):
    """POST /v1/completions"""

    DEFAULT_MAX_TOKENS: ClassVar[int] = 16  # OpenAI's

    prompt: Prompt = Field(description="Text or token ids, one or several.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Likeliest tokens at each position.")
    echo: bool | None = Field(None, description="Begin the text, and the logprobs, with the prompt.")
    max_tokens: int | None = Field(
        None, ge=0, le=UINT32_MAX, description="Longest completion, in tokens; 0 only with echo. Default 16."
    )
    add_special_tokens: bool | None = Field(None, description="For prompts of text. Default true.")
    suffix: Annotated[Literal[""] | None, only_neutral("an empty string")] = None

    @model_validator(mode="after")
    def _nothing_is_wanted_only_of_an_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise misplaced("max_tokens", "must be at least 1, unless echo is true")
        return self

    @property
    def is_echo_only(self) -> bool:
        """The prompt is wanted back, with its log-probabilities, and nothing after it."""
        return self.max_tokens == 0

    @property
    def longest_completion(self) -> int | None:
        return self.DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo and self.prompt_logprobs is None else self.prompt_logprobs


def misplaced(param: str, message: str, code: str = "misplaced") -> PydanticCustomError:
    """An error about one field found while looking at all of them; `param` is below the one looked at."""
    details: dict[str, Any] = {"param": param}
    return PydanticCustomError(code, message, details)

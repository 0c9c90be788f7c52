"""POST /v1/chat/completions, field by field."""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, JsonValue, field_validator, model_validator

from gateway.fields import UINT32_MAX, JsonSchema, NonEmpty, described_as, only_neutral, shallow
from gateway.schemas import CommonRequest, Empty, Schema, misplaced

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
MAX_TOOLS = 128


class TextPart(Schema):
    type: Literal["text"]
    text: str


class CalledFunction(Schema):
    name: FunctionName
    arguments: str = Field(description="A JSON object, as text.")

    @field_validator("arguments")
    @classmethod
    def _is_an_object(cls, value: str) -> str:
        try:
            is_object = isinstance(json.loads(value or "{}"), dict)
        except (ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise misplaced("", "must be the text of a JSON object")
        return value


class ToolCall(Schema):
    id: NonEmpty
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="Accepted; the order counts.")


class Message(Schema):
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description='"developer" is read as "system".'
    )
    content: Annotated[
        str | list[TextPart] | None, described_as('a string or a list of parts of the type "text"')
    ] = Field(None, description="May only be left out by an assistant that calls tools.")
    name: str | None = Field(None, description="Passed to the chat template.")
    reasoning_content: str | None = Field(None, description="Passed to the chat template.")
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS, description="Of an assistant.")
    tool_call_id: str | None = Field(None, description="Which call a tool's message answers.")
    # What clients send back with an answer they got: empty, since this server never fills them.
    refusal: Annotated[None, only_neutral("null")] = None
    audio: Annotated[None, only_neutral("null")] = None
    function_call: Annotated[None, only_neutral("null")] = None
    annotations: Annotated[Empty | None, only_neutral("[]")] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise misplaced("tool_calls", "are an assistant's")
        if self.role == "tool" and not self.tool_call_id:
            raise misplaced("tool_call_id", "Missing required parameter", "missing")
        if self.content is None and not self.tool_calls:
            raise misplaced("content", "Missing required parameter", "missing")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class Function(Schema):
    name: FunctionName
    description: str | None = None
    parameters: JsonSchema | None = Field(None, description="JSON Schema of the arguments.")
    strict: bool | None = Field(None, description="Accepted; forced calls always follow the schema.")


class Tool(Schema):
    type: Literal["function"]
    function: Function


class FunctionReference(Schema):
    name: FunctionName


class NamedToolChoice(Schema):
    type: Literal["function"]
    function: FunctionReference


class TextFormat(Schema):
    type: Literal["text"]


class JsonObjectFormat(Schema):
    type: Literal["json_object"]


class NamedJsonSchema(Schema):
    name: NonEmpty
    description: str | None = Field(None, description="Accepted; not used.")
    json_schema: JsonSchema | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Accepted; answers always follow the schema.")


class JsonSchemaFormat(Schema):
    type: Literal["json_schema"]
    json_schema: NamedJsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class TemplateOptions(Schema):
    """What a chat template makes a prompt of, beside messages."""

    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="Functions to choose from.")
    chat_template_kwargs: Annotated[dict[str, JsonValue], AfterValidator(shallow)] | None = Field(
        None, description="Further variables for the chat template."
    )
    chat_template: NonEmpty | None = Field(
        None, description="A Jinja template in place of the model's, if the server allows it."
    )
    add_generation_prompt: bool | None = Field(None, description="Open the assistant's turn. Default true.")

    @field_validator("tools")
    @classmethod
    def _names_differ(cls, tools: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in tools or ()]
        if twice := {name for name in names if names.count(name) > 1}:
            raise misplaced("", f"must not name a function twice: {', '.join(sorted(twice))}")
        return tools


class ChatCompletionRequest(CommonRequest, TemplateOptions):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(
        None, ge=1, le=UINT32_MAX, description="Goes before max_tokens. Default: what the context leaves."
    )
    logprobs: bool | None = Field(None, description="Tell each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="Likeliest tokens at each position.")
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedToolChoice | None,
        described_as('"none", "auto", "required" or {"type": "function", "function": {"name": ...}}'),
    ] = Field(None, description='Default "auto" with tools.')
    parallel_tool_calls: bool | None = Field(None, description="More than one call. Default true.")
    response_format: ResponseFormat | None = Field(None, description="What the answer must look like.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = Field(
        None, description="Passed to the chat template."
    )
    thinking_token_budget: int | None = Field(
        None, ge=1, le=UINT32_MAX, description="Tokens after which the model's thinking is closed for it."
    )
    reasoning_max_tokens: int | None = Field(
        None, ge=1, le=UINT32_MAX, description="thinking_token_budget, by another name."
    )
    include_reasoning: bool | None = Field(None, description="Tell the reasoning apart. Default true.")
    # Passed over, as documented
    safety_identifier: str | None = Field(None, description="Accepted; not used.")
    prompt_cache_key: str | None = Field(None, description="Accepted; prefixes are found by content.")
    # Known, and only possible with the value that asks for nothing
    functions: Annotated[Empty | None, only_neutral("[]")] = None
    function_call: Annotated[Literal["none", "auto"] | None, only_neutral('"none"')] = None
    modalities: Annotated[list[Literal["text"]] | None, only_neutral('["text"]')] = None
    audio: Annotated[None, only_neutral("null")] = None
    prediction: Annotated[None, only_neutral("null")] = None
    verbosity: Annotated[Literal["medium"] | None, only_neutral('"medium"')] = None
    web_search_options: Annotated[None, only_neutral("null")] = None
    response_max_tokens: Annotated[None, only_neutral("max_tokens, which counts the thinking too")] = None
    store: Annotated[Literal[False] | None, only_neutral("false")] = None
    service_tier: Annotated[Literal["auto", "default"] | None, only_neutral('"auto"')] = None
    echo: Annotated[Literal[False] | None, only_neutral("false")] = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise misplaced("top_logprobs", "is only allowed when logprobs is true")
        return self

    @model_validator(mode="after")
    def _a_choice_is_among_the_tools(self) -> Self:
        choice, names = self.tool_choice, [tool.function.name for tool in self.tools or ()]
        if choice not in (None, "none", "auto") and not names:
            raise misplaced("tool_choice", "is only allowed when tools are given")
        if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
            raise misplaced("tool_choice", f"names {choice.function.name!r}, which is none of the tools")
        return self

    @model_validator(mode="after")
    def _one_form_at_a_time(self) -> Self:
        """The form of an answer leaves no room for a call."""
        has_format = self.response_format is not None and self.response_format.type != "text"
        if has_format and self.structured_field is not None:
            raise misplaced("response_format", f"cannot be combined with {self.structured_field}")
        if (has_format or self.structured_field) and self.offered_tools:
            name = "response_format" if has_format else self.structured_field
            raise misplaced(name or "", 'cannot be combined with tools, unless tool_choice is "none"')
        return self

    @model_validator(mode="after")
    def _thinking_is_free(self) -> Self:
        """What the engine forces the form of begins with no thinking."""
        if self.thinking_field is None:
            return self
        if self.thinking_token_budget is not None and self.reasoning_max_tokens is not None:
            raise misplaced("reasoning_max_tokens", "cannot be combined with thinking_token_budget")
        has_format = self.response_format is not None and self.response_format.type != "text"
        if has_format or self.structured_field or self.forced_tools:
            raise misplaced(self.thinking_field, "cannot be combined with a form that the answer must have")
        return self

    @property
    def thinking_field(self) -> str | None:
        """Name of the field that limits the thinking."""
        names = "thinking_token_budget", "reasoning_max_tokens"
        return next((name for name in names if getattr(self, name) is not None), None)

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[Tool]:
        """The tools of which the answer must call one; none if it may do without."""
        if isinstance(self.tool_choice, NamedToolChoice):
            name = self.tool_choice.function.name
            return [tool for tool in self.offered_tools if tool.function.name == name]
        return self.offered_tools if self.tool_choice == "required" else []

    @property
    def longest_completion(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

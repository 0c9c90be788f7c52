"""What a completion must look like: the request's words for it as the worker's one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gateway.chat_schemas import ChatCompletionRequest, JsonObjectFormat, JsonSchemaFormat, Tool
from gateway.schemas import CommonRequest
from protos.wint2.common.v1.common_pb2 import AnyJsonObject, Choices, StructuredOutput


def structured_output(body: CommonRequest) -> StructuredOutput | None:
    """None if anything goes."""
    if isinstance(body, ChatCompletionRequest):
        if body.forced_tools:
            is_parallel = body.parallel_tool_calls is not False
            return StructuredOutput(json_schema=json.dumps(calls_schema(body.forced_tools, is_parallel)))
        if body.response_format is not None:
            return from_response_format(body.response_format)
    return from_fields(body)


def wire_fields(body: CommonRequest) -> dict[str, str]:
    """What the request calls the fields that have other names on the wire, for errors about them."""
    name = body.structured_field
    if isinstance(body, ChatCompletionRequest):
        name = "tools" if body.forced_tools else name or "response_format"
    return {"structured_output": name or "structured_outputs", "bad_words_token_ids": "bad_words"}


def from_response_format(form: object) -> StructuredOutput | None:
    if isinstance(form, JsonObjectFormat):
        return StructuredOutput(json_object=AnyJsonObject())
    if not isinstance(form, JsonSchemaFormat):
        return None
    schema = form.json_schema.json_schema
    if schema is None:
        return StructuredOutput(json_object=AnyJsonObject())
    return StructuredOutput(json_schema=as_text(schema))


def from_fields(body: CommonRequest) -> StructuredOutput | None:
    """vLLM's and FastDeploy's fields, of which the schema lets one pass."""
    given = body.structured_outputs
    schema = body.guided_json if given is None else given.json_schema
    choice = body.guided_choice if given is None else given.choice
    if schema is not None:
        return StructuredOutput(json_schema=as_text(schema))
    if choice is not None:
        return StructuredOutput(choice=Choices(texts=choice))
    regex = body.guided_regex if given is None else given.regex
    grammar = body.guided_grammar if given is None else given.grammar
    if regex is not None:
        return StructuredOutput(regex=regex)
    if grammar is not None:
        return StructuredOutput(grammar=grammar)
    return StructuredOutput(json_object=AnyJsonObject()) if given is not None else None


def as_text(schema: str | dict[str, Any]) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def calls_schema(tools: Sequence[Tool], is_parallel: bool) -> dict[str, Any]:
    """JSON Schema of a list of calls, at least one; the parameters' own definitions move to the top."""
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        parameters = dict(tool.function.parameters or {"type": "object"})
        for name in ("$defs", "definitions"):
            definitions.setdefault(name, {}).update(parameters.pop(name, None) or {})
        if "properties" in parameters:
            parameters.setdefault("additionalProperties", False)  # functions take no others
        calls.append(call_schema(tool.function.name, parameters))
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    limit = {} if is_parallel else {"maxItems": 1}
    return schema | limit | {name: found for name, found in definitions.items() if found}


def call_schema(name: str, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }

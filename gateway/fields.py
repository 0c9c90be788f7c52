"""The kinds of field that OpenAI's request shapes are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

MAX_STOPS = 16
MAX_DEPTH = 16
MAX_SCHEMA_DEPTH = 48
MAX_SCHEMA_CHARS = 65_536
UINT32_MAX = (1 << 32) - 1
INT32_MAX = (1 << 31) - 1
INT64_MAX = (1 << 63) - 1


def described_as(expectation: str) -> WrapValidator:
    """One message in place of one a branch of a union: `expectation` completes "must be ..."."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "expectation", "must be {expectation}", {"expectation": expectation}
            ) from None

    return WrapValidator(validate)


def only_neutral(default: str) -> WrapValidator:
    """A known parameter that this server cannot honour: only the value that asks for nothing passes."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            message = "is not supported by this server; leave it out or send {default}"
            raise PydanticCustomError("unsupported_parameter", message, {"default": default}) from None

    return WrapValidator(validate)


def shallow(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Refuses nesting that no template needs and that the wire cannot carry."""
    return checked_depth(value, MAX_DEPTH)


def small(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Refuses a JSON Schema whose grammar would take long to build."""
    checked_size(json.dumps(checked_depth(value, MAX_SCHEMA_DEPTH)))
    return value


def small_schema(value: dict[str, JsonValue] | str) -> dict[str, JsonValue] | str:
    """The same for one that may come as text."""
    return checked_size(value) if isinstance(value, str) else small(value)


def checked_size(text: str) -> str:
    if len(text) > MAX_SCHEMA_CHARS:
        raise PydanticCustomError(
            "too_long",
            "must be no more than {limit} characters of JSON, not {size}",
            {"limit": MAX_SCHEMA_CHARS, "size": len(text)},
        )
    return text


def checked_depth(value: dict[str, JsonValue], limit: int) -> dict[str, JsonValue]:
    level: list[JsonValue] = [value]
    for _ in range(limit + 1):
        level = [child for item in level for child in children(item)]
        if not level:
            return value
    raise PydanticCustomError("too_deep", "must not be nested deeper than {limit} levels", {"limit": limit})


def children(value: JsonValue) -> list[JsonValue]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


TokenId = Annotated[int, Field(ge=0, le=UINT32_MAX)]
NonEmpty = Annotated[str, Field(min_length=1)]
TokenIdList = Annotated[list[TokenId], Field(min_length=1)]
Stop = Annotated[
    Annotated[str, Field(min_length=1)] | Annotated[list[NonEmpty], Field(max_length=MAX_STOPS)],
    described_as(f"a non-empty string or a list of at most {MAX_STOPS} non-empty strings"),
]
Prompt = Annotated[
    NonEmpty
    | TokenIdList
    | Annotated[list[NonEmpty], Field(min_length=1)]
    | Annotated[list[TokenIdList], Field(min_length=1)],
    described_as(
        "a string, a list of strings, a list of token ids or a list of lists of token ids, none empty"
    ),
]
JsonSchema = Annotated[dict[str, JsonValue], AfterValidator(small)]
SchemaOrText = Annotated[
    dict[str, JsonValue] | NonEmpty,
    described_as("a JSON Schema, as an object or as text"),
    AfterValidator(small_schema),
]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),
    described_as("an object of at most 1024 token ids with a bias between -100 and 100 each"),
]

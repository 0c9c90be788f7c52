"""How to draw a completion: what a caller may ask of the sampler, with defaults and limits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

MAX_LOGPROBS = 20

_NUMBERS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip
_OPTIONAL = ("seed", "max_tokens", "logprobs", "prompt_logprobs")
_INTEGERS = ("top_k", "min_tokens", "n", *_OPTIONAL)


class SamplingParamsError(ValueError):
    """A value outside its range; `field` names the parameter."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What a completion's text must look like: exactly one of these.

    `json_schema` is JSON text or what `json.loads` makes of it; `regex` matches the whole text; `grammar` is
    in Lark's notation or in GBNF.
    """

    json_object: bool = False
    json_schema: str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        schema: Any = self.json_schema
        if schema is not None and not isinstance(schema, str):
            object.__setattr__(self, "json_schema", json.dumps(schema))
        object.__setattr__(self, "choice", tuple(self.choice or ()))
        given = [name for name, value in self._values() if value not in (None, False, ())]
        if len(given) != 1:
            names = ", ".join(name for name, _ in self._values())
            message = f"must have one of {names}; {', '.join(given) or 'none'} given"
            raise SamplingParamsError("structured_output", message)

    def _values(self) -> list[tuple[str, object]]:
        return [(one.name, getattr(self, one.name)) for one in fields(self)]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling parameters. `temperature=0` and `top_p=0` are greedy.

    `bad_words` are texts, which only `LLM` takes; the engine knows them as `bad_words_token_ids`. `LLM` alone
    also heeds `include_stop_str_in_output` and `skip_special_tokens`, which are about a completion's text.
    `top_k` is off at 0 and at -1.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_output: StructuredOutput | None = None
    n: int = 1
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_types()
        self._normalise()
        self._check_range("temperature", 0.0, 2.0)
        self._check_range("top_p", 0.0, 1.0)
        self._check_range("min_p", 0.0, 1.0)
        self._check_range("presence_penalty", -2.0, 2.0)
        self._check_range("frequency_penalty", -2.0, 2.0)
        self._check_range("top_k", 0, None)
        self._check_range("min_tokens", 0, None)
        self._check_range("n", 1, 128)
        self._check_range("repetition_penalty", 0.0, 2.0)
        if self.repetition_penalty == 0.0:
            raise SamplingParamsError("repetition_penalty", "must be greater than 0")
        if self.max_tokens is not None:
            self._check_range("max_tokens", 1, None)
            self._check_range("min_tokens", 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_range(name, 0, MAX_LOGPROBS)
        self._check_tokens()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_p == 0.0 or self.top_k == 1

    @property
    def is_filtered(self) -> bool:
        """Whether some tokens are cut off before the draw."""
        return self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def is_penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def _check_types(self) -> None:
        for name in _NUMBERS:
            if not isinstance(getattr(self, name), Real):
                raise SamplingParamsError(name, f"must be a number, got {getattr(self, name)!r}")
        for name in _INTEGERS:
            value = getattr(self, name)
            if not isinstance(value, Integral) and not (value is None and name in _OPTIONAL):
                raise SamplingParamsError(name, f"must be an integer, got {value!r}")

    def _normalise(self) -> None:
        """Tuples and dicts of whatever collections the caller wrote, a lone string being one of them."""
        object.__setattr__(self, "top_k", 0 if self.top_k == -1 else self.top_k)
        for name in ("stop", "bad_words"):
            object.__setattr__(self, name, _strings(getattr(self, name)))
        for name in ("stop_token_ids", "allowed_token_ids"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        runs = tuple(map(tuple, self.bad_words_token_ids or ()))
        object.__setattr__(self, "bad_words_token_ids", runs)
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))

    def _check_range(self, name: str, low: float, high: float | None) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and value >= low and (high is None or value <= high)):
            limits = f"between {low} and {high}" if high is not None else f"at least {low}"
            raise SamplingParamsError(name, f"must be {limits}, got {value}")

    def _check_tokens(self) -> None:
        for token_id, value in self.logit_bias.items():
            if not -100 <= value <= 100:
                raise SamplingParamsError(
                    "logit_bias", f"of token {token_id} must be between -100 and 100, got {value}"
                )
        if not all(self.bad_words_token_ids):
            raise SamplingParamsError("bad_words_token_ids", "must not hold an empty run of tokens")


def _strings(given: str | Iterable[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())

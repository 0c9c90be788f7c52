"""How to draw a completion: what a caller may ask of the sampler, with defaults and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_LOGPROBS = 20


class SamplingParamsError(ValueError):
    """A value outside its range; `field` names the parameter."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """One request's sampling parameters. `temperature=0` and `top_p=0` are greedy."""

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
    logprobs: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
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
        if self.logprobs is not None:
            self._check_range("logprobs", 0, MAX_LOGPROBS)
        for token_id, value in self.logit_bias.items():
            if not -100 <= value <= 100:
                raise SamplingParamsError(
                    "logit_bias", f"of token {token_id} must be between -100 and 100, got {value}"
                )

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

    def _check_range(self, name: str, low: float, high: float | None) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and value >= low and (high is None or value <= high)):
            limits = f"between {low} and {high}" if high is not None else f"at least {low}"
            raise SamplingParamsError(name, f"must be {limits}, got {value}")

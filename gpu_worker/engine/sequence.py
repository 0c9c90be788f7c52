"""A request, the sequences it becomes, and what each step tells about them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.grammars import Constraint
from gpu_worker.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "aborted", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """Token ids to complete.

    `arrival_time` and `deadline` are seconds of `time.monotonic()`. Lower priorities run first. Prefix-cache
    blocks are shared only between requests of the same `cache_salt`.
    """

    request_id: str
    prompt_token_ids: Seq[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    arrival_time: float = 0.0
    deadline: float | None = None


class TokenLogprob(NamedTuple):
    """A token and the natural logarithm of its probability before temperature and penalties."""

    token_id: int
    logprob: float


class PositionLogprobs(NamedTuple):
    """The sampled token of one position and the likeliest ones, best first."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]

    @property
    def sampled(self) -> TokenLogprob:
        return TokenLogprob(self.token_id, self.logprob)

    @property
    def top(self) -> tuple[TokenLogprob, ...]:
        return tuple(map(TokenLogprob, self.top_ids, self.top_logprobs))


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a finished sequence's time went: until first scheduled, until its first token, until its last."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(slots=True)
class StepOutput:
    """What one or more steps gave to one sequence; `index` counts the `n` completions of a request."""

    request_id: str
    index: int
    token_ids: list[int]
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    logprobs: list[PositionLogprobs] | None = None
    prompt_logprobs: list[PositionLogprobs] | None = None  # with the first token of completion 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    timings: Timings | None = None
    error: str | None = None

    def merge(self, later: StepOutput) -> None:
        """Appends what came next to what has not been read yet."""
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = (self.logprobs or []) + later.logprobs
        self.num_completion_tokens = later.num_completion_tokens
        self.finish_reason, self.stop_token_id = later.finish_reason, later.stop_token_id
        self.timings, self.error = later.timings, later.error


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion in the making.

    While it runs, `row` is its row in the `SequenceTable`, which then owns its tokens; while it waits,
    `token_ids` holds the prompt and whatever was generated before a preemption.
    """

    request: Request
    index: int
    order: tuple[
        float, int, int
    ]  # arrival moved by priority, number of the request, index: the smallest runs first
    seed: int
    max_total_tokens: int
    stop_ids: tuple[int, ...]
    token_ids: NDArray[np.int32]
    row: int | None = None
    was_admitted: bool = False
    num_cached_tokens: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    constraint: Constraint | None = None
    first: Sequence | None = None  # completion 0 of the request, for the others
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)

    @property
    def has_unscored_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are asked for and not all known; completion 0 has them."""
        if self.index or self.request.params.prompt_logprobs is None:
            return False
        return len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known when it last left the running set, or at its arrival."""
        return len(self.token_ids)

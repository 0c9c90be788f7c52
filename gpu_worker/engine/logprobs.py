"""Log-probabilities of tokens and of their likeliest rivals, for the requests that ask.

They are the model's own: taken from the logits before the sampler edits them.
S sequences that are sampled, R rows of logits that are asked about, T tokens of the step, V vocabulary, K
likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from cuda_kernels.sampling import find_likeliest
from gpu_worker.engine.scheduler import ScheduledStep
from gpu_worker.engine.sequence import PositionLogprobs, Sequence
from gpu_worker.engine.sequence_table import Rows, SequenceTable

_T = TypeVar("_T")

# Prompt positions scored at a time: bounds the memory that their logits take.
_MAX_ROWS = 256


class LogprobReader:
    """The distributions of some of a step's positions, kept until their tokens are drawn."""

    def __init__(self, logits_SV: torch.Tensor, positions: Rows, num_top_S: Rows) -> None:
        self._positions = positions
        self._num_top = num_top_S[positions].tolist()
        self._at = torch.from_numpy(positions).to(logits_SV.device)
        is_all = len(positions) == len(logits_SV)
        logits_RV = logits_SV if is_all else logits_SV.index_select(0, self._at)
        self._logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
        self._entries: _Entries | None = None

    def take(self, token_ids_S: torch.Tensor) -> None:
        """Sends what is to be told of the drawn tokens on its way to the host."""
        self._entries = _Entries(self._logprobs_RV, token_ids_S[self._at], self._num_top)

    def read(self) -> dict[int, PositionLogprobs]:
        """By position in S: the drawn token's log-probability and as many top ones as asked for."""
        assert self._entries is not None
        return dict(zip(self._positions.tolist(), self._entries.read(), strict=True))


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Rows [first_row, first_row + count) of T: their logits are about the prompt's next tokens to score."""

    sequence: Sequence
    first_row: int
    count: int


class PromptScorer:
    """Gives prompts their log-probabilities, as the steps compute them chunk by chunk.

    The logits of the token at position p are about position p + 1, so the first token has none, and an entry
    i of `Sequence.prompt_logprobs` comes from position i.
    """

    def __init__(self, table: SequenceTable, logits: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self._table = table
        self._logits = logits
        self._unscored: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """A sequence that has just been given a row."""
        if sequence.has_unscored_prompt and sequence not in self._unscored:
            self._unscored.append(sequence)

    def find(self, step: ScheduledStep) -> list[_Stretch]:
        """What the step computes of prompts that are to be scored."""
        self._unscored = [s for s in self._unscored if s.row is not None and s.has_unscored_prompt]
        return [stretch for sequence in self._unscored for stretch in self._stretch(sequence, step)]

    def score(self, stretches: Iterable[_Stretch], hidden_TD: torch.Tensor) -> None:
        """Takes the hidden states of all tokens of the step."""
        for stretch in stretches:
            for start in range(0, stretch.count, _MAX_ROWS):
                first = stretch.first_row + start
                count = min(_MAX_ROWS, stretch.count - start)
                self._score(stretch.sequence, hidden_TD[first : first + count])

    def _stretch(self, sequence: Sequence, step: ScheduledStep) -> Iterator[_Stretch]:
        (index,) = np.flatnonzero(step.rows == sequence.row).tolist()
        count = int(step.num_scheduled[index])
        start = int(self._table.num_computed[sequence.row])
        first, end = (
            max(start, len(sequence.prompt_logprobs)),
            min(start + count, sequence.num_prompt_tokens - 1),
        )
        if first < end:
            yield _Stretch(sequence, int(step.num_scheduled[:index].sum()) + first - start, end - first)

    def _score(self, sequence: Sequence, hidden_RD: torch.Tensor) -> None:
        known = sequence.prompt_logprobs
        logprobs_RV = torch.log_softmax(self._logits(hidden_RD), dim=-1)
        start, count = len(known) + 1, len(hidden_RD)
        targets = torch.tensor(sequence.request.prompt_token_ids[start : start + count])
        num_top = sequence.request.params.prompt_logprobs or 0
        entries = _Entries(logprobs_RV, targets.to(logprobs_RV.device), [num_top] * count)
        if logprobs_RV.is_cuda:
            torch.cuda.synchronize()
        known += entries.read()


class _Entries:
    """For each row its token's log-probability, and the likeliest ones, best first."""

    def __init__(self, logprobs_RV: torch.Tensor, token_ids_R: torch.Tensor, num_top: list[int]) -> None:
        count = min(max(num_top, default=0), logprobs_RV.shape[1])
        values_RK, ids_RK = find_likeliest(logprobs_RV, count)
        own_R = logprobs_RV.gather(1, token_ids_R[:, None]).squeeze(1)
        self._num_top = num_top
        self._on_host = [x.to("cpu", non_blocking=True) for x in (token_ids_R, own_R, ids_RK, values_RK)]

    def read(self) -> Iterator[PositionLogprobs]:
        """Once the device has got there."""
        token_ids, own, ids, values = (x.tolist() for x in self._on_host)
        if min(self._num_top) < max(self._num_top):
            ids, values = map(self._shorten, (ids, values))
        return map(PositionLogprobs, token_ids, own, ids, values)

    def _shorten(self, rows: list[list[_T]]) -> list[list[_T]]:
        return [row[:count] for row, count in zip(rows, self._num_top, strict=True)]

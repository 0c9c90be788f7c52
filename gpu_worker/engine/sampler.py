"""Turns the logits of a step into one token for each sequence that is due one.

Each row of the sequence table has its parameters in columns here. What a set of rows needs (who is greedy,
whose logits are edited and how) is worked out once, and kept until the set changes; a steady decode step is
then a handful of tensor operations, however many sequences run.

N rows of the sequence table, S sequences that are sampled in this step, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cuda_kernels.sampling import Wishes, draw
from gpu_worker.engine.forbidden import ForbiddenTokens
from gpu_worker.engine.grammars import Grammars
from gpu_worker.engine.logprobs import LogprobReader
from gpu_worker.engine.penalties import Penalties, Strengths
from gpu_worker.engine.sequence import PositionLogprobs, Sequence
from gpu_worker.engine.sequence_table import Rows, SequenceTable
from gpu_worker.engine.structure import TokenMasks
from gpu_worker.engine.uniforms import uniforms
from gpu_worker.sampling_params import SamplingParams

_DRAW_COLUMNS = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
_PENALTY_COLUMNS = dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), np.float32)

_NOTHING_FINITE = (
    "the model gave no finite probability to any allowed token (NaN, or everything was forbidden)"
)


@dataclass(frozen=True, slots=True)
class Samples:
    """Token ids [S], and by position in S what is to be said of some of them.

    Those in `errors` mean nothing; those `is_complete` end a structured text that nothing can follow.
    """

    token_ids: Rows
    is_complete: NDArray[np.bool_]
    errors: dict[int, str]
    logprobs: dict[int, PositionLogprobs]

    def of(self, positions: Rows) -> Samples:
        """What concerns some of the sequences."""
        place = {position: i for i, position in enumerate(positions.tolist())}
        return Samples(
            self.token_ids[positions],
            self.is_complete[positions],
            {place[i]: error for i, error in self.errors.items() if i in place},
            {place[i]: logprobs for i, logprobs in self.logprobs.items() if i in place},
        )


@dataclass(frozen=True, slots=True)
class Drawn:
    """What `Sampler.draw` has begun; the device may still be at it."""

    token_ids_S: torch.Tensor  # int64, on the device
    rows: Rows
    host_token_ids_S: torch.Tensor
    host_peaks_S: torch.Tensor
    logprobs: LogprobReader | None
    is_structured: bool
    is_done: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class _Plan:
    """Positions in S by what is done to them, and their parameters, on the device."""

    rows: Rows
    penalised: torch.Tensor
    biased: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # position, token id, value
    forbidden: ForbiddenTokens
    structured: Rows
    with_logprobs: Rows
    wishes: Wishes
    strengths: Strengths
    rows_X: torch.Tensor  # of the penalised
    no_uniforms: torch.Tensor | None  # [S], where nobody needs a random number


class Sampler:
    """Owns the sampling parameters of the running sequences."""

    def __init__(
        self,
        table: SequenceTable,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
        grammars: Grammars | None = None,
    ) -> None:
        self._table = table
        self._vocab_size = vocab_size
        self._device = device
        self._params: list[SamplingParams] = [SamplingParams()] * max_num_seqs
        columns = _DRAW_COLUMNS | _PENALTY_COLUMNS
        self._columns = {name: np.zeros(max_num_seqs, dtype) for name, dtype in columns.items()}
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._is_random = np.zeros(max_num_seqs, np.bool_)
        self._is_penalised = np.zeros(max_num_seqs, np.bool_)
        self._is_biased = np.zeros(max_num_seqs, np.bool_)
        self._is_structured = np.zeros(max_num_seqs, np.bool_)
        self._reads_tokens = np.zeros(max_num_seqs, np.bool_)
        self._num_logprobs = np.full(max_num_seqs, -1, np.int64)
        self._penalties = Penalties(max_num_seqs, vocab_size, device)
        self._masks = TokenMasks(table, vocab_size, grammars)
        self._cached_plan: _Plan | None = None

    def attach(self, sequence: Sequence) -> None:
        """Takes up the parameters of a sequence that was just given a row."""
        assert sequence.row is not None
        row, params = sequence.row, sequence.request.params
        self._params[row] = params
        for name, column in self._columns.items():
            column[row] = getattr(params, name)
        self._seeds[row] = sequence.seed
        self._is_random[row] = not params.is_greedy
        if params.is_greedy:
            self._columns["temperature"][row] = 0.0
        self._is_penalised[row] = params.is_penalised
        self._is_biased[row] = bool(params.logit_bias)
        self._is_structured[row] = sequence.constraint is not None
        self._reads_tokens[row] = sequence.constraint is not None or bool(params.bad_words_token_ids)
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        if params.is_penalised:
            self._penalties.set_row(row, sequence)
        self._cached_plan = None

    def prepare(self, rows: Rows) -> None:
        """Does what can be done for the next `sample` while the model runs."""
        plan = self._plan(rows)
        self._masks.start(rows, plan.structured)

    def needs_tokens(self, rows: Rows) -> bool:
        """Whether what may follow one of the rows depends on its last token itself."""
        return bool(self._reads_tokens[rows].any())

    def draw(self, logits_SV: torch.Tensor, rows: Rows) -> Drawn:
        """Draws a token for each of the rows, as prepared. float32 logits; edits them in place."""
        plan = self._plan(rows)
        logprobs = None
        if len(plan.with_logprobs):
            logprobs = LogprobReader(logits_SV, plan.with_logprobs, self._num_logprobs[rows])
        self._edit(logits_SV, plan)
        token_ids_S, peaks_S = draw(logits_SV, plan.wishes, self._uniforms(plan))
        if len(plan.penalised):
            self._penalties.add(plan.rows_X, token_ids_S[plan.penalised], plan.strengths)
        if logprobs is not None:
            logprobs.take(token_ids_S)
        # On their way to the host now, ahead of what the device is given next.
        host = [x.to("cpu", non_blocking=True) for x in (token_ids_S, peaks_S)]
        is_done = torch.cuda.Event() if logits_SV.is_cuda else None
        if is_done is not None:
            is_done.record()
        return Drawn(token_ids_S, rows, host[0], host[1], logprobs, len(plan.structured) > 0, is_done)

    def read(self, drawn: Drawn) -> Samples:
        """Waits for what was drawn."""
        if drawn.is_done is not None:
            drawn.is_done.synchronize()
        token_ids = drawn.host_token_ids_S.numpy()
        is_poisoned = ~np.isfinite(drawn.host_peaks_S.numpy())
        is_complete = np.zeros(len(token_ids), np.bool_)
        errors = dict.fromkeys(np.flatnonzero(is_poisoned).tolist(), _NOTHING_FINITE)
        if drawn.is_structured:
            self._advance(token_ids, is_complete, errors)
        logprobs = drawn.logprobs.read() if drawn.logprobs else {}
        return Samples(token_ids, is_complete, errors, logprobs)

    def _edit(self, logits_SV: torch.Tensor, plan: _Plan) -> None:
        positions, token_ids, values = plan.biased
        if len(positions):
            logits_SV[positions, token_ids] += values
        if len(plan.penalised):
            self._penalties.apply(logits_SV, plan.penalised, plan.rows_X)
        plan.forbidden.apply(logits_SV)
        self._masks.apply(logits_SV)

    def _advance(self, token_ids: Rows, is_complete: NDArray[np.bool_], errors: dict[int, str]) -> None:
        """Takes structured texts a token further."""
        for position, constraint in self._masks.advance(token_ids).items():
            is_complete[position] = constraint.is_complete
            if constraint.error is not None:
                errors.setdefault(position, f"structured_output cannot be followed: {constraint.error}")

    def _uniforms(self, plan: _Plan) -> torch.Tensor:
        if plan.no_uniforms is not None:
            return plan.no_uniforms
        table, rows = self._table, plan.rows
        return self._to(uniforms(self._seeds[rows], table.num_tokens[rows] - table.num_prompt_tokens[rows]))

    def _plan(self, rows: Rows) -> _Plan:
        if self._cached_plan is None or not np.array_equal(self._cached_plan.rows, rows):
            self._cached_plan = self._make_plan(rows)
        return self._cached_plan

    def _make_plan(self, rows: Rows) -> _Plan:
        params = [self._params[row] for row in rows.tolist()]
        penalised = np.flatnonzero(self._is_penalised[rows])
        no_uniforms = None if self._is_random[rows].any() else self._to(np.zeros(len(rows)))
        return _Plan(
            rows=rows,
            penalised=self._to(penalised),
            biased=self._biases(rows),
            forbidden=ForbiddenTokens.of(self._table, rows, params, self._vocab_size, self._device),
            structured=np.flatnonzero(self._is_structured[rows]),
            with_logprobs=np.flatnonzero(self._num_logprobs[rows] >= 0),
            wishes=Wishes(*(self._to(self._columns[name][rows]) for name in _DRAW_COLUMNS)),
            strengths=Strengths(
                *(self._to(self._columns[name][rows[penalised]]) for name in _PENALTY_COLUMNS)
            ),
            rows_X=self._to(rows[penalised]),
            no_uniforms=no_uniforms,
        )

    def _biases(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        triples = [
            (i, token_id, value)
            for i in np.flatnonzero(self._is_biased[rows]).tolist()
            for token_id, value in self._params[rows[i]].logit_bias.items()
        ]
        positions, token_ids, values = zip(*triples, strict=True) if triples else ((), (), ())
        return (
            self._to(np.array(positions, np.int64)),
            self._to(np.array(token_ids, np.int64)),
            self._to(np.array(values, np.float32)),
        )

    def _to(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

"""Repetition, presence and frequency penalties of each sequence's tokens, as two numbers a token.

N rows of the sequence table, X sequences of a step that are penalised, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cuda_kernels.sampling import penalise
from gpu_worker.engine.sequence import Sequence


class Strengths(NamedTuple):
    """The penalties of some rows, float32 [X] each."""

    repetition_X: torch.Tensor
    presence_X: torch.Tensor
    frequency_X: torch.Tensor


class Penalties:
    """What each row's logits are to be changed by, kept up to date token by token.

    Memory is taken when the first penalised request arrives.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._shape = (max_num_seqs, vocab_size)
        self._device = device
        self._divisor_NV = torch.ones(0)  # of the row's tokens its repetition penalty, of others 1
        self._loss_NV = torch.zeros(0)  # of the completion's tokens presence + frequency · count, of others 0
        self._is_generated_NV = torch.zeros(0, dtype=torch.bool)

    def set_row(self, row: int, sequence: Sequence) -> None:
        """Takes the tokens of a sequence that starts, or goes on after a preemption."""
        if not self._loss_NV.numel():
            self._divisor_NV = torch.ones(self._shape, device=self._device)
            self._loss_NV = torch.zeros(self._shape, device=self._device)
            self._is_generated_NV = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
        params, completion = sequence.request.params, sequence.token_ids[sequence.num_prompt_tokens :]
        known = np.bincount(sequence.token_ids, minlength=self._shape[1]) > 0
        counts = np.bincount(completion, minlength=self._shape[1])
        loss = params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        self._divisor_NV[row] = self._to(np.where(known, params.repetition_penalty, 1.0))
        self._loss_NV[row] = self._to(loss)
        self._is_generated_NV[row] = self._to(counts) > 0

    def add(self, rows_X: torch.Tensor, token_ids_X: torch.Tensor, strengths: Strengths) -> None:
        """Takes one more token of each row; the rows differ."""
        at = rows_X, token_ids_X
        self._divisor_NV[at] = strengths.repetition_X
        self._loss_NV[at] += strengths.frequency_X + strengths.presence_X * ~self._is_generated_NV[at]
        self._is_generated_NV[at] = True

    def apply(self, logits_SV: torch.Tensor, positions_X: torch.Tensor, rows_X: torch.Tensor) -> None:
        """In place, the logits at these positions; only repetition looks at the prompt too."""
        penalise(logits_SV, positions_X, rows_X, self._divisor_NV, self._loss_NV)

    def _to(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float32)).to(self._device)

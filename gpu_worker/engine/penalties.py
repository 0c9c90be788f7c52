"""Repetition, presence and frequency penalties of each sequence's tokens, as two numbers a token.

N rows of the sequence table, S sequences of a step, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gpu_worker.engine.sequence import Sequence


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

    def add(
        self,
        rows_S: torch.Tensor,
        token_ids_S: torch.Tensor,
        repetition_S: torch.Tensor,
        presence_S: torch.Tensor,
        frequency_S: torch.Tensor,
    ) -> None:
        """Takes one more token of each row; the rows differ."""
        at = rows_S, token_ids_S
        self._divisor_NV[at] = repetition_S
        self._loss_NV[at] += frequency_S + presence_S * ~self._is_generated_NV[at]
        self._is_generated_NV[at] = True

    def apply(self, logits_SV: torch.Tensor, rows_S: torch.Tensor) -> torch.Tensor:
        """Logits after the penalties; only repetition looks at the prompt besides the completion."""
        divisor_SV = self._divisor_NV.index_select(0, rows_S)
        penalised_SV = logits_SV.clamp(min=0).div_(divisor_SV)
        penalised_SV += divisor_SV.mul_(logits_SV.clamp(max=0))
        return penalised_SV.sub_(self._loss_NV.index_select(0, rows_S))

    def _to(self, array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float32)).to(self._device)

"""Keeps the structured completions of a step to the texts they may become.

    start ──► masks, on a thread of their own ──┐
          ──► the model, on the device ─────────┴──► apply ──► draw ──► advance

S sequences that are sampled in a step, X those of them whose text is structured, V vocabulary, W = V / 32.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from cuda_kernels.sampling import forbid
from gpu_worker.engine.grammars import Constraint, Grammars
from gpu_worker.engine.sequence_table import Rows, SequenceTable

_Masks = NDArray[np.int32]


class TokenMasks:
    """The masks of one step, from `start` to `advance`."""

    def __init__(self, table: SequenceTable, vocab_size: int, grammars: Grammars | None) -> None:
        self._table = table
        self._grammars = grammars
        self._width = -(-vocab_size // 32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._constraints: dict[int, Constraint] = {}  # by position in S
        self._masks: Future[_Masks] | None = None

    def start(self, rows: Rows, positions: Rows) -> None:
        """Begins with the masks of the `positions` in `rows`, whose tokens are all known by now."""
        sequences = zip(positions.tolist(), map(self._table.sequence, rows[positions].tolist()), strict=True)
        self._constraints = {at: one.constraint for at, one in sequences if one.constraint is not None}
        self._masks = self._thread.submit(self._fill) if self._constraints else None

    def apply(self, logits_SV: torch.Tensor) -> None:
        """Sets the logits of all tokens that may not follow to minus infinity, in place."""
        if self._masks is None:
            return
        masks_XW = torch.from_numpy(self._masks.result()).to(logits_SV.device)
        forbid(logits_SV, torch.tensor(list(self._constraints), device=logits_SV.device), masks_XW)

    def advance(self, token_ids_S: Rows) -> dict[int, Constraint]:
        """Takes the tokens that were drawn; by position in S the constraints that cannot go on."""
        token_ids = token_ids_S.tolist()
        constraints = self._constraints.items()
        return {at: constraint for at, constraint in constraints if not constraint.advance(token_ids[at])}

    def _fill(self) -> _Masks:
        assert self._grammars is not None
        masks_XW = np.zeros((len(self._constraints), self._width), np.int32)
        self._grammars.fill(list(self._constraints.values()), masks_XW)
        return masks_XW

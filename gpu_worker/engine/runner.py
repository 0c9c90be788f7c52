"""Runs the model on a step's tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache


class Model(Protocol):
    """What the engine asks of a decoder."""

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Hidden states [T, D] after the last norm; writes the new keys and values."""
        ...

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """float32 logits [S, V]."""
        ...


class Graphs(Protocol):
    """Batches that can be run in a quicker way."""

    def can_run(self, batch: Batch) -> bool: ...

    def run(self, batch: Batch) -> torch.Tensor:
        """float32 logits [S, V] of every sequence's last new token."""
        ...


class ModelRunner:
    """The model, its KV cache, and CUDA graphs of its decode steps if there are any."""

    def __init__(self, model: Model, kv_cache: KVCache, graphs: Graphs | None = None) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._graphs = graphs

    def run(
        self,
        batch: Batch,
        sampled: torch.Tensor | None,
        read_hidden: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:
        """float32 logits [S, V] of the sequences' last new tokens, or of those at the `sampled` positions.

        `read_hidden` is shown the hidden states [T, D] of all tokens.
        """
        is_plain = sampled is None and read_hidden is None
        if self._graphs is not None and is_plain and self._graphs.can_run(batch):
            return self._graphs.run(batch)
        hidden_TD = self._model.forward(batch, self._kv_cache)
        if read_hidden is not None:
            read_hidden(hidden_TD)
        rows = batch.sample_rows_S if sampled is None else batch.sample_rows_S[sampled]
        return self._model.logits(hidden_TD[rows])

"""Short steps with prompts as CUDA graphs: without them their launches would take longer than their kernels.

    tokens      0 … n-1 | n … size-1       size: the smallest captured one that holds n
    sequences   0 … s-1 | s … S-2 | S-1    those between have no token, the last one has the padding tokens,
                                           whose slot is -1 and whose results nobody reads

What is computed are hidden states; which of them are sampled is left to the caller.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable

import torch

from gpu_worker.engine.cuda_graphs import PADDING_SLOT, Capture
from gpu_worker.engine.runner import Model
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache

TOKEN_SIZES = (16, 32, 64, 96, 128, 192, 256, 384, 512)
_MAX_SEQUENCES = 16
_MAX_CONTEXT = (
    4096  # attention is cut into shares for the longest context, more of them than a short one needs
)
_MAX_DEVICE_SHARE = 1.25

logger = logging.getLogger(__name__)


def is_launch_bound(function: Callable[[], None]) -> bool:
    """Whether the GPU is done about as soon as the last kernel is launched: it waited for launches."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return time.perf_counter() - start < _MAX_DEVICE_SHARE * (launched - start)


class PromptGraphs:
    """A model whose short steps with prompts are replayed, on the one KV cache that it was captured with."""

    def __init__(self, model: Model, kv_cache: KVCache, max_blocks: int, device: torch.device) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._max_blocks = min(max_blocks, -(-_MAX_CONTEXT // kv_cache.block_size))
        self._sizes: list[int] = []
        self._replays: dict[int, Callable[[], None]] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        ids = torch.zeros(TOKEN_SIZES[-1], dtype=torch.int64, device=device)
        lens = torch.ones(_MAX_SEQUENCES + 1, dtype=torch.int32, device=device)
        self._buffers = Batch(
            input_ids_T=ids,
            positions_T=ids.clone(),
            slot_mapping_T=torch.full_like(ids, PADDING_SLOT),
            block_tables_SM=lens.new_zeros((len(lens), self._max_blocks)),
            cu_seqlens_q=lens.new_zeros(len(lens) + 1),
            context_lens_S=lens,
            max_query_len=2,  # several: that a graph's steps have more is told by cu_seqlens_q
            sample_rows_S=torch.zeros_like(ids[: len(lens)]),
        )

    @torch.inference_mode()
    def capture(
        self, capture: Capture, is_worth_it: Callable[[Callable[[], None]], bool] = is_launch_bound
    ) -> None:
        """Captures sizes for as long as launches, not kernels, take a step's time."""
        for size in TOKEN_SIZES:
            if size > self._max_blocks * self._kv_cache.block_size:
                break
            self._pad(0, 0, size)
            replay = capture(lambda size=size: self._run(size))  # type: ignore[misc]
            if not is_worth_it(lambda size=size: self._run(size)):  # type: ignore[misc]
                break
            self._replays[size] = replay
            self._sizes.append(size)
        logger.info("captured CUDA graphs for steps with prompts of %s tokens", self._sizes or "no")

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Hidden states [T, D]; overwritten by the next step."""
        if not self._can_replay(batch):
            return self._model.forward(batch, kv_cache)
        size = self._sizes[bisect_left(self._sizes, batch.num_tokens)]
        self._fill(batch)
        self._pad(batch.num_tokens, batch.num_sequences, size)
        self._replays[size]()
        return self._hidden[size][: batch.num_tokens]

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden_SD)

    def _can_replay(self, batch: Batch) -> bool:
        return (
            bool(self._sizes)
            and batch.num_tokens <= self._sizes[-1]
            and batch.num_sequences <= _MAX_SEQUENCES
            and batch.block_tables_SM.shape[1] <= self._max_blocks
        )

    def _fill(self, batch: Batch) -> None:
        tokens, sequences, buffers = batch.num_tokens, batch.num_sequences, self._buffers
        buffers.input_ids_T[:tokens] = batch.input_ids_T
        buffers.positions_T[:tokens] = batch.positions_T
        buffers.slot_mapping_T[:tokens] = batch.slot_mapping_T
        buffers.block_tables_SM[:sequences, : batch.block_tables_SM.shape[1]] = batch.block_tables_SM
        buffers.cu_seqlens_q[: sequences + 1] = batch.cu_seqlens_q
        buffers.context_lens_S[:sequences] = batch.context_lens_S
        buffers.sample_rows_S[:sequences] = batch.sample_rows_S

    def _pad(self, num_tokens: int, num_sequences: int, size: int) -> None:
        buffers = self._buffers
        buffers.input_ids_T[num_tokens:size] = 0  # one token for all: few experts are read for them
        buffers.positions_T[num_tokens:size] = 0
        buffers.slot_mapping_T[num_tokens:size] = PADDING_SLOT
        buffers.cu_seqlens_q[num_sequences:-1] = num_tokens
        buffers.cu_seqlens_q[-1] = size
        buffers.context_lens_S[num_sequences:-1] = 0
        buffers.context_lens_S[-1] = size - num_tokens
        buffers.sample_rows_S[num_sequences:] = size - 1

    def _run(self, size: int) -> None:
        hidden_TD = self._model.forward(self._slice(size), self._kv_cache)
        self._hidden.setdefault(size, torch.empty_like(hidden_TD)).copy_(hidden_TD)

    def _slice(self, size: int) -> Batch:
        buffers = self._buffers
        return Batch(
            input_ids_T=buffers.input_ids_T[:size],
            positions_T=buffers.positions_T[:size],
            slot_mapping_T=buffers.slot_mapping_T[:size],
            block_tables_SM=buffers.block_tables_SM,
            cu_seqlens_q=buffers.cu_seqlens_q,
            context_lens_S=buffers.context_lens_S,
            max_query_len=buffers.max_query_len,
            sample_rows_S=buffers.sample_rows_S,
        )

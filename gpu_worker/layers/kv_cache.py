"""The paged KV cache's memory: a key and a value tensor for each layer, cut into blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from cuda_kernels.cache_format import CacheScales, has_levels

_SCALE_BYTES = 4


class KVCache:
    """Keys and values of every layer, each [B, P, G, C]: B blocks of P slots, G KV heads, head dim C.

    Levels (int8, float8_e4m3fn) have a scale for each slot and head besides.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (2, num_blocks, block_size, num_kv_heads, head_dim)
        # Zeros, not empty: a stray NaN in a slot that attention masks would still poison 0 * NaN.
        self._storage = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = [(kv[0], kv[1]) for kv in self._storage]
        self.scales: list[CacheScales | None] = [None] * num_layers
        # What moves as a block does, by block in dimension 1; bytes, as not every device can index e4m3.
        self._by_block = self._storage
        if has_levels(dtype):
            scale_shape = (2, num_blocks, num_kv_heads, block_size)
            scales = [torch.zeros(scale_shape, device=device) for _ in range(num_layers)]
            self.scales = [CacheScales(both[0], both[1]) for both in scales]
            self._by_block = [*(kv.view(torch.int8) for kv in self._storage), *scales]

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of every layer: from the first of each pair to the second."""
        source, target = torch.tensor(pairs, device=self._storage[0].device).unbind(1)
        for kv in self._by_block:
            kv[:, target] = kv[:, source]

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zeros, so that a NaN in a block is not met by who takes the block next."""
        at = torch.tensor(blocks, dtype=torch.int64, device=self._storage[0].device)
        for kv in self._by_block:
            kv[:, at] = 0

    @cached_property
    def addresses(self) -> NDArray[np.int64]:
        """Of every layer's keys and values: [L, 2]."""
        return np.array([[keys.data_ptr(), values.data_ptr()] for keys, values in self.layers])

    @property
    def size_bytes(self) -> int:
        return sum(kv.nbytes for kv in self._by_block)

    @staticmethod
    def block_bytes(
        num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes that one block takes over all layers."""
        head_bytes = head_dim * dtype.itemsize + (_SCALE_BYTES if has_levels(dtype) else 0)
        return 2 * num_layers * block_size * num_kv_heads * head_bytes

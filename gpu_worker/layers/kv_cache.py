"""The paged KV cache's memory: a key and a value tensor for each layer, cut into blocks of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class KVCache:
    """Keys and values of every layer, each [B, P, G, C]: B blocks of P slots, G KV heads, head dim C."""

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

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of every layer: from the first of each pair to the second."""
        source, target = torch.tensor(pairs, device=self._storage[0].device).unbind(1)
        for kv in self._storage:
            kv[:, target] = kv[:, source]

    @property
    def size_bytes(self) -> int:
        return sum(kv.nbytes for kv in self._storage)

    @staticmethod
    def block_bytes(
        num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes that one block takes over all layers."""
        return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize

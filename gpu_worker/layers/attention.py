"""Grouped-query self-attention over the paged KV cache.

Shapes: T tokens, D hidden, H query heads, G KV heads, C head dim, P positions or slots in a block, B blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cuda_kernels.cache_format import CacheScales
from cuda_kernels.kv_store import kv_store
from cuda_kernels.paged_attention import paged_attention
from cuda_kernels.rope import rope
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.linear import Linear
from gpu_worker.layers.norm import RMSNorm


@dataclass(frozen=True, slots=True)
class Attention:
    """qkv projection (columns Q | K | V), norms of q and k, rotary embedding, cache, attention, output."""

    qkv_proj: Linear
    o_proj: Linear
    cos_sin_PC: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: torch.Tensor | None = None
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def __call__(
        self,
        hidden_TD: torch.Tensor,
        batch: Batch,
        key_cache_BPGC: torch.Tensor,
        value_cache_BPGC: torch.Tensor,
        scales: CacheScales | None = None,
    ) -> torch.Tensor:
        query_THC, key_TGC, value_TGC = self._project(hidden_TD)
        query_THC, key_TGC = rope(query_THC, key_TGC, batch.positions_T, self.cos_sin_PC)
        kv_store(key_TGC, value_TGC, key_cache_BPGC, value_cache_BPGC, batch.slot_mapping_T, scales)
        attended_THC = paged_attention(
            query_THC,
            key_cache_BPGC,
            value_cache_BPGC,
            batch.block_tables_SM,
            batch.cu_seqlens_q,
            batch.context_lens_S,
            batch.max_query_len,
            self.head_dim**-0.5,
            batch.attention_plan,
            scales,
        )
        return self.o_proj(attended_THC.flatten(1))

    def _project(self, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        fused_TN = self.qkv_proj(hidden_TD)
        if self.qkv_bias is not None:
            fused_TN = fused_TN + self.qkv_bias
        heads = fused_TN.view(len(hidden_TD), -1, self.head_dim)
        query_THC, key_TGC, value_TGC = torch.split(
            heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1
        )
        if self.q_norm is not None and self.k_norm is not None:
            query_THC, key_TGC = _normed(query_THC, self.q_norm), _normed(key_TGC, self.k_norm)
        return query_THC, key_TGC, value_TGC


def _normed(x_THC: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """Heads by themselves, or all together, as the weight is wide."""
    normed, _ = norm(x_THC.reshape(-1, norm.weight_D.shape[0]), None)
    return normed.view(x_THC.shape)

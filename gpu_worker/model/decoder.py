"""The decoder: embedding, layers of attention and (dense or mixture-of-experts) feed-forward, head.

Shapes: T tokens in the step, S sampled rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from cuda_kernels.cache_format import CacheScales
from cuda_kernels.paged_attention import is_compiled, plan_attention
from gpu_worker.config import ModelConfig
from gpu_worker.layers.attention import Attention
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.embedding import Embedding
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.layers.linear import Linear, PanelSwiGLU, SwiGLU
from gpu_worker.layers.moe import MoE
from gpu_worker.layers.norm import RMSNorm
from gpu_worker.layers.ranks import ALONE, Ranks


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """residual += attention(norm(residual)); residual += mlp(norm(residual)); each a sum over the ranks."""

    input_norm: RMSNorm
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: SwiGLU | PanelSwiGLU | MoE
    ranks: Ranks = ALONE

    def __call__(
        self,
        hidden_TD: torch.Tensor,
        residual_TD: torch.Tensor | None,
        batch: Batch,
        kv: tuple[torch.Tensor, torch.Tensor],
        scales: CacheScales | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(hidden, residual): the sum of both is the layer's output; the next norm adds them."""
        normed_TD, residual_TD = self.input_norm(hidden_TD, residual_TD)
        attended_TD = self.ranks.sum(self.attention(normed_TD, batch, *kv, scales))
        normed_TD, residual_TD = self.post_attention_norm(attended_TD, residual_TD)
        return self.ranks.sum(self.mlp(normed_TD)), residual_TD


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes of weights by kind: as stored in the checkpoint, and as held on the device."""

    stored_bytes: Mapping[str, int]
    device_bytes: Mapping[str, int]


class CompiledLayers(Protocol):
    """All layers and the final norm at once, over a KV cache of float32; may overwrite the hidden state."""

    def __call__(self, hidden_TD: torch.Tensor, batch: Batch, kv_cache: KVCache) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Decoder:
    """A loaded model, or one rank's part of it, with the config of that part. On a GPU `forward` never waits
    for the device, so that a CUDA graph can hold it.
    """

    config: ModelConfig
    embedding: Embedding
    layers: tuple[DecoderLayer, ...]
    final_norm: RMSNorm
    lm_head: Linear
    memory: MemoryReport
    ranks: Ranks = ALONE
    compiled: CompiledLayers | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the hidden state."""
        return self.final_norm.weight_D.dtype

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """The final hidden state of every token of the step, [T, D]; stores its keys and values."""
        batch = self._with_attention_plan(batch, kv_cache.block_size)
        hidden_TD = self.embedding(batch.input_ids_T).to(self.dtype)
        if self.compiled is not None and kv_cache.layers[0][0].dtype == torch.float32:
            return self.compiled(hidden_TD, batch, kv_cache)
        residual_TD: torch.Tensor | None = None
        for layer, kv, scales in zip(self.layers, kv_cache.layers, kv_cache.scales, strict=True):
            hidden_TD, residual_TD = layer(hidden_TD, residual_TD, batch, kv, scales)
        normed_TD, _ = self.final_norm(hidden_TD, residual_TD)
        return normed_TD

    def _with_attention_plan(self, batch: Batch, block_size: int) -> Batch:
        config = self.config
        if is_compiled(config.head_dim, self.dtype):
            return batch
        plan = plan_attention(
            batch.block_tables_SM,
            batch.cu_seqlens_q,
            batch.context_lens_S,
            batch.max_query_len,
            block_size,
            config.num_attention_heads // config.num_key_value_heads,
        )
        return replace(batch, attention_plan=plan)

    @torch.inference_mode()
    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """Next-token scores of the rows that sample: [S, V] float32."""
        return self.ranks.join(self.lm_head(hidden_SD), self.config.vocab_size).float()

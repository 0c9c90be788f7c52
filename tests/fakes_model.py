"""A model without weights: its next token is a hash of all tokens before it, read back from the KV cache.

So a wrong block, a stale slot or a prefix shared between unequal prompts changes the completion.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gpu_worker.config import CacheConfig, EngineConfig, ModelConfig, QuantizationConfig, SchedulerConfig
from gpu_worker.engine.engine import Engine
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache

VOCAB_SIZE = 61
EOS = 1
POISON = 60  # a prompt that holds this token gives NaN logits
MODULUS = 1_000_003


class HashModel:
    """Keys hold the token id, values its position; the hidden state is a hash of the context they spell."""

    def __init__(self) -> None:
        self.num_forward_tokens: list[int] = []
        self.error: Exception | None = None

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        self.num_forward_tokens.append(batch.num_tokens)
        key, value = kv_cache.layers[0]
        key.view(-1)[batch.slot_mapping_T] = batch.input_ids_T.float()
        value.view(-1)[batch.slot_mapping_T] = batch.positions_T.float()
        return torch.cat([self._hash(batch, kv_cache, s) for s in range(batch.num_sequences)])

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        ids_V = torch.arange(VOCAB_SIZE)
        mixed_SV = (hidden_SD[:, :1] * 7919 + (ids_V + 1) ** 2 * 104_729) % MODULUS
        logits_SV = (mixed_SV % 1009).float() / 200
        logits_SV[:, POISON] = -torch.inf
        return torch.where(hidden_SD[:, 1:] > 0, torch.nan, logits_SV)

    def _hash(self, batch: Batch, kv_cache: KVCache, s: int) -> torch.Tensor:
        """[query tokens, 2]: hash of the context, and whether it holds POISON."""
        key, value = kv_cache.layers[0]
        end = int(batch.context_lens_S[s])
        query_len = int(batch.cu_seqlens_q[s + 1] - batch.cu_seqlens_q[s])
        positions = torch.arange(end)
        size = kv_cache.block_size
        slots = batch.block_tables_SM[s, positions // size].long() * size + positions % size
        token_ids, written_at = key.view(-1)[slots].long(), value.view(-1)[slots].long()
        assert torch.equal(written_at, positions), "a slot holds another position's token"
        weights = (positions + 1) * 31_337 % MODULUS
        hashes = (((token_ids + 1) * weights) % MODULUS).cumsum(0) % MODULUS
        is_poisoned = (token_ids == POISON).cumsum(0)
        return torch.stack([hashes, is_poisoned], dim=1)[end - query_len :]


def model_config(vocab_size: int = VOCAB_SIZE) -> ModelConfig:
    return ModelConfig(
        path=Path("fake"),
        model_type="fake",
        vocab_size=vocab_size,
        hidden_size=2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=1,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        compression_ratio=1.0,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        num_experts=1,
        num_experts_per_token=1,
        moe_intermediate_size=1,
        num_shared_experts=0,
        moe_layer_start_index=0,
        moe_layer_end_index=0,
        moe_layer_interval=1,
        norm_min=0.0,
        eos_token_ids=(EOS,),
        quantization=QuantizationConfig(),
    )


def engine_config(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 64,
    enable_prefix_caching: bool = True,
    enable_chunked_prefill: bool = True,
    vocab_size: int = VOCAB_SIZE,
) -> EngineConfig:
    return EngineConfig(
        model=model_config(vocab_size),
        cache=CacheConfig(block_size, num_blocks, enable_prefix_caching, torch.float32),
        scheduler=SchedulerConfig(
            max_num_seqs, max_num_batched_tokens, max_model_len, enable_chunked_prefill
        ),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def make_engine(
    config: EngineConfig | None = None, model: HashModel | None = None, **limits: int | bool
) -> Engine:
    config = config or engine_config(**limits)  # type: ignore[arg-type]
    cache = config.cache
    kv_cache = KVCache(1, cache.num_blocks, cache.block_size, 1, 1, cache.dtype, config.device)
    return Engine(config, model or HashModel(), kv_cache)

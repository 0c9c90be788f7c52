"""A model without weights: its next token is a hash of all tokens before it, read back from the KV cache.

So a wrong block, a stale slot or a prefix shared between unequal prompts changes the completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gpu_worker.config import CacheConfig, EngineConfig, ModelConfig, QuantizationConfig, SchedulerConfig
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.grammars import Grammars
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache

VOCAB_SIZE = 61
EOS = 1
POISON = 60  # a prompt that holds this token gives NaN logits
MODULUS = 1_000_003


def hash_logits(hashes_S: torch.Tensor, is_poisoned_S: torch.Tensor) -> torch.Tensor:
    """float32 logits [S, V], no two of a row alike."""
    ids_V = torch.arange(VOCAB_SIZE)
    mixed_SV = (hashes_S[:, None] * 7919 + (ids_V + 1) ** 2 * 104_729) % MODULUS
    logits_SV = (mixed_SV % 1009).float() / 200 + ids_V * 7e-5
    logits_SV[:, POISON] = -torch.inf
    return torch.where(is_poisoned_S[:, None], torch.nan, logits_SV)


def context_logits(token_ids: Sequence[int]) -> torch.Tensor:
    """float32 logits [V] of what follows the tokens: the model's definition, without a KV cache."""
    ids = torch.tensor(token_ids)
    weights = (torch.arange(len(ids)) + 1) * 31_337 % MODULUS
    spelled = ((ids + 1) * weights % MODULUS).sum() % MODULUS
    return hash_logits(spelled[None], (ids == POISON).any()[None])[0]


class HashModel:
    """Keys hold the token id, values its position; the hidden state is a hash of the context they spell."""

    def __init__(self) -> None:
        self.num_forward_tokens: list[int] = []
        self.error: Exception | None = None

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """[T, 2]: hash of each token's context, and whether that holds POISON."""
        if self.error is not None:
            raise self.error
        self.num_forward_tokens.append(batch.num_tokens)
        key, value = kv_cache.layers[0]
        is_real_T = batch.slot_mapping_T >= 0
        slots = batch.slot_mapping_T[is_real_T]
        key.view(-1)[slots] = batch.input_ids_T[is_real_T].float()
        value.view(-1)[slots] = batch.positions_T[is_real_T].float()
        tokens_SL, is_known_SL = self._read_contexts(batch, kv_cache)
        weights_L = (torch.arange(tokens_SL.shape[1]) + 1) * 31_337 % MODULUS
        hashes_SL = ((tokens_SL + 1) * weights_L % MODULUS * is_known_SL).cumsum(1) % MODULUS
        is_poisoned_SL = ((tokens_SL == POISON) & is_known_SL).cumsum(1)
        sequence_T = torch.arange(batch.num_sequences).repeat_interleave(batch.cu_seqlens_q.diff())
        return torch.stack([hashes_SL, is_poisoned_SL], dim=-1)[sequence_T, batch.positions_T]

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        return hash_logits(hidden_SD[:, 0], hidden_SD[:, 1] > 0)

    def _read_contexts(self, batch: Batch, kv_cache: KVCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [S, L] as the cache has them, and where there are any; a padding row has none."""
        key, value = kv_cache.layers[0]
        positions_L = torch.arange(int(batch.context_lens_S.max()))
        is_real_S = batch.slot_mapping_T[batch.sample_rows_S] >= 0
        is_known_SL = (positions_L < batch.context_lens_S[:, None]) & is_real_S[:, None]
        block_L, offset_L = positions_L // kv_cache.block_size, positions_L % kv_cache.block_size
        slots_SL = batch.block_tables_SM[:, block_L].long() * kv_cache.block_size + offset_L
        written_at_SL = value.view(-1)[slots_SL].long()
        assert torch.equal(written_at_SL[is_known_SL], positions_L.expand_as(slots_SL)[is_known_SL]), (
            "a slot holds another position's token"
        )
        return key.view(-1)[slots_SL].long(), is_known_SL


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
    overlap: bool = False,
) -> EngineConfig:
    return EngineConfig(
        model=model_config(vocab_size),
        cache=CacheConfig(block_size, num_blocks, enable_prefix_caching, torch.float32),
        scheduler=SchedulerConfig(
            max_num_seqs, max_num_batched_tokens, max_model_len, enable_chunked_prefill
        ),
        device=torch.device("cpu"),
        dtype=torch.float32,
        overlap=overlap,
    )


def make_engine(
    config: EngineConfig | None = None,
    model: HashModel | None = None,
    grammars: Grammars | None = None,
    **limits: int | bool,
) -> Engine:
    config = config or engine_config(**limits)  # type: ignore[arg-type]
    cache = config.cache
    kv_cache = KVCache(1, cache.num_blocks, cache.block_size, 1, 1, cache.dtype, config.device)
    return Engine(config, model or HashModel(), kv_cache, grammars=grammars)

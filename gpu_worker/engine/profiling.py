"""What the largest step takes besides weights and KV cache: measured, by running it."""

from __future__ import annotations

import torch

from gpu_worker.config import EngineConfig
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.model.decoder import Decoder

PADDING_SLOT = -1


@torch.inference_mode()
def measure_activation_bytes(model: Decoder, config: EngineConfig) -> int:
    """Peak bytes of one step of `max_num_batched_tokens` tokens with every sequence sampled, on a GPU."""
    shape, limits, device = model.config, config.scheduler, config.device
    block_size = config.cache.block_size  # the served one: a kernel may not take another
    heads = shape.num_key_value_heads, shape.head_dim
    kv_cache = KVCache(shape.num_hidden_layers, 1, block_size, *heads, config.cache.dtype, device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batch = padding_batch(limits.max_num_batched_tokens, limits.max_num_seqs, device, block_size)
    logits_SV = model.logits(model.forward(batch, kv_cache)[batch.sample_rows_S])
    logits_SV.clone().log_softmax(dim=-1)  # what the sampler takes at most: everybody wants logprobs
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del logits_SV, batch, kv_cache
    torch.cuda.empty_cache()
    return peak


def padding_batch(num_tokens: int, num_sequences: int, device: torch.device, block_size: int = 1) -> Batch:
    """A batch of as many sequences, of about equal length, whose keys and values are stored nowhere."""
    bounds = torch.linspace(0, num_tokens, num_sequences + 1).round().int()
    lens = bounds.diff()
    return Batch(
        input_ids_T=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        positions_T=torch.zeros(num_tokens, dtype=torch.int64, device=device),
        slot_mapping_T=torch.full((num_tokens,), PADDING_SLOT, dtype=torch.int64, device=device),
        block_tables_SM=torch.zeros(
            (num_sequences, -(-int(lens.max()) // block_size)), dtype=torch.int32, device=device
        ),
        cu_seqlens_q=bounds.to(device),
        context_lens_S=lens.to(device),
        max_query_len=int(lens.max()),
        sample_rows_S=(bounds[1:] - 1).long().to(device),
    )

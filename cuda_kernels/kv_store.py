"""Op `kv_store`: write a step's keys and values to their slots of the paged cache.

    slot = block_id * P + offset in the block          slot -1: a padding token, not stored

Shapes: T tokens, B blocks, P slots in a block, G KV heads, C head dim.
"""

from __future__ import annotations

import torch


def kv_store(
    key_TGC: torch.Tensor,
    value_TGC: torch.Tensor,
    key_cache_BPGC: torch.Tensor,
    value_cache_BPGC: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """Store key and value of token t in slot `slot_mapping_T[t]` (int64) of the two caches, in place."""
    is_real_T = slot_mapping_T >= 0
    if not bool(is_real_T.all()):
        key_TGC, value_TGC = key_TGC[is_real_T], value_TGC[is_real_T]
        slot_mapping_T = slot_mapping_T[is_real_T]
    key_cache_BPGC.flatten(0, 1).index_copy_(0, slot_mapping_T, key_TGC.to(key_cache_BPGC.dtype))
    value_cache_BPGC.flatten(0, 1).index_copy_(0, slot_mapping_T, value_TGC.to(value_cache_BPGC.dtype))

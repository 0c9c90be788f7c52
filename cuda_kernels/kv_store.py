"""Op `kv_store`: write a step's keys and values to their slots of the paged cache.

    slot = block_id * P + offset in the block          slot -1: a padding token, not stored

Shapes: T tokens, B blocks, P slots in a block, G KV heads, C head dim.
"""

from __future__ import annotations

import torch

from cuda_kernels.build import Variant
from cuda_kernels.compiled import cpu, has_compiled
from cuda_kernels.launch import Argument, Device, cuda_device

_VECTOR_BYTES, _THREADS = 16, 256  # as in csrc/kv_store.cu


def kv_store(
    key_TGC: torch.Tensor,
    value_TGC: torch.Tensor,
    key_cache_BPGC: torch.Tensor,
    value_cache_BPGC: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """Store key and value of token t in slot `slot_mapping_T[t]` (int64) of the two caches, in place."""
    if key_TGC.is_cuda:
        device = cuda_device(key_TGC.device.index)
        launch_kv_store(device, key_TGC, value_TGC, key_cache_BPGC, value_cache_BPGC, slot_mapping_T)
        return
    if has_compiled(key_TGC) and key_cache_BPGC.dtype == torch.float32:
        cpu.kv_store(key_TGC, key_cache_BPGC, slot_mapping_T)
        cpu.kv_store(value_TGC, value_cache_BPGC, slot_mapping_T)
        return
    is_real_T = slot_mapping_T >= 0
    if not bool(is_real_T.all()):
        key_TGC, value_TGC = key_TGC[is_real_T], value_TGC[is_real_T]
        slot_mapping_T = slot_mapping_T[is_real_T]
    key_cache_BPGC.flatten(0, 1).index_copy_(0, slot_mapping_T, key_TGC.to(key_cache_BPGC.dtype))
    value_cache_BPGC.flatten(0, 1).index_copy_(0, slot_mapping_T, value_TGC.to(value_cache_BPGC.dtype))


def launch_kv_store(
    device: Device,
    key_TGC: torch.Tensor,
    value_TGC: torch.Tensor,
    key_cache_BPGC: torch.Tensor,
    value_cache_BPGC: torch.Tensor,
    slot_mapping_T: torch.Tensor,
) -> None:
    """The same by the kernel, which copies bytes; a token's heads are adjacent, tokens anywhere."""
    if not key_TGC.dtype == value_TGC.dtype == key_cache_BPGC.dtype == value_cache_BPGC.dtype:
        raise ValueError(f"kv_store: keys are {key_TGC.dtype}, the cache holds {key_cache_BPGC.dtype}")
    row_bytes = key_TGC[0].nbytes if len(key_TGC) else 0
    if row_bytes % _VECTOR_BYTES:
        raise ValueError(
            f"kv_store: a token's keys take {row_bytes} bytes, need a multiple of {_VECTOR_BYTES}"
        )
    per_vector = _VECTOR_BYTES // key_TGC.element_size()
    strides = [key_TGC.stride(0) // per_vector, value_TGC.stride(0) // per_vector]
    arguments: list[Argument] = [key_TGC, value_TGC, key_cache_BPGC, value_cache_BPGC, slot_mapping_T]
    arguments += [*strides, row_bytes // _VECTOR_BYTES]
    if len(key_TGC):
        device.launch(
            Variant("kv_store"), "kv_store", (len(key_TGC), 1), _THREADS, 0, arguments, overlaps=True
        )

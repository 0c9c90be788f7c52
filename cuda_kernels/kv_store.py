"""Op `kv_store`: write a step's keys and values to their slots of the paged cache.

    slot = block_id * P + offset in the block          slot -1: a padding token, not stored

Shapes: T tokens, B blocks, P slots in a block, G KV heads, C head dim.
"""

from __future__ import annotations

import torch

from cuda_kernels.build import Variant
from cuda_kernels.cache_format import CacheScales, has_levels, quantize
from cuda_kernels.compiled import cpu, has_compiled
from cuda_kernels.launch import Argument, Device, cuda_device

_VECTOR_BYTES, _THREADS = 16, 256  # as in csrc/kv_store.cu


def kv_store(
    key_TGC: torch.Tensor,
    value_TGC: torch.Tensor,
    key_cache_BPGC: torch.Tensor,
    value_cache_BPGC: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    scales: CacheScales | None = None,
) -> None:
    """Store key and value of token t in slot `slot_mapping_T[t]` (int64) of the two caches, in place.

    A cache of levels (int8, float8_e4m3fn) needs its `scales`, which are written too.
    """
    if key_TGC.is_cuda:
        device = cuda_device(key_TGC.device.index)
        caches = key_cache_BPGC, value_cache_BPGC
        if scales is None:
            launch_kv_store(device, key_TGC, value_TGC, *caches, slot_mapping_T)
        else:
            launch_store_levels(device, key_TGC, value_TGC, *caches, slot_mapping_T, scales)
        return
    if has_compiled(key_TGC) and key_cache_BPGC.dtype == torch.float32:
        cpu.kv_store(key_TGC, key_cache_BPGC, slot_mapping_T)
        cpu.kv_store(value_TGC, value_cache_BPGC, slot_mapping_T)
        return
    is_real_T = slot_mapping_T >= 0
    if not bool(is_real_T.all()):
        key_TGC, value_TGC = key_TGC[is_real_T], value_TGC[is_real_T]
        slot_mapping_T = slot_mapping_T[is_real_T]
    _store(key_TGC, key_cache_BPGC, slot_mapping_T, scales and scales.keys_BGP)
    _store(value_TGC, value_cache_BPGC, slot_mapping_T, scales and scales.values_BGP)


def _store(
    rows_TGC: torch.Tensor, cache_BPGC: torch.Tensor, slots_T: torch.Tensor, scales_BGP: torch.Tensor | None
) -> None:
    if scales_BGP is None:
        cache_BPGC.flatten(0, 1).index_copy_(0, slots_T, rows_TGC.to(cache_BPGC.dtype))
        return
    levels_TGC, scales_TG = quantize(rows_TGC, cache_BPGC.dtype)
    block_size = cache_BPGC.shape[1]
    cache_BPGC.view(torch.int8).flatten(0, 1).index_copy_(0, slots_T, levels_TGC.view(torch.int8))
    scales_BGP[slots_T // block_size, :, slots_T % block_size] = scales_TG


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


def launch_store_levels(
    device: Device,
    key_TGC: torch.Tensor,
    value_TGC: torch.Tensor,
    key_cache_BPGC: torch.Tensor,
    value_cache_BPGC: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    scales: CacheScales,
) -> None:
    """Quantizes bfloats on the way, a warp a head; a token's heads are adjacent, tokens anywhere."""
    num_tokens, num_heads, head_dim = key_TGC.shape
    if key_TGC.dtype != torch.bfloat16 or not has_levels(key_cache_BPGC.dtype) or head_dim % 2:
        raise ValueError(f"kv_store: {key_TGC.dtype} heads of {head_dim} to {key_cache_BPGC.dtype}")
    block_size = key_cache_BPGC.shape[1]
    arguments: list[Argument] = [
        key_TGC,
        value_TGC,
        key_cache_BPGC,
        value_cache_BPGC,
        *scales,
        slot_mapping_T,
    ]
    arguments += [key_TGC.stride(0) // 2, value_TGC.stride(0) // 2, num_heads, head_dim // 2, block_size]
    kernel = "kv_store_int8" if key_cache_BPGC.dtype == torch.int8 else "kv_store_fp8"
    if num_tokens:
        device.launch(Variant("kv_store"), kernel, (num_tokens, 1), _THREADS, 0, arguments, overlaps=True)

"""How the KV cache keeps a number: as it is, or as one byte, times a float32 scale of its token and head.

    scale = max |x| over the head's features / largest level
    level = x / scale, to the nearest one, ties to even

    int8    levels -127 .. 127           off by at most max |x| / 254
    fp8     e4m3, levels up to 448       off by at most |x| / 16, or max |x| / 2^18 where that is more

The bytes are computed alike on every device.
Shapes: T tokens, B blocks, P slots in a block, G KV heads, C head dim, I some blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LARGEST_LEVEL = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
SMALLEST_PEAK = 1e-30  # of a head that is all zeros, say


class CacheScales(NamedTuple):
    """Float32 scales of keys and values; a head's slots in a block lie side by side."""

    keys_BGP: torch.Tensor
    values_BGP: torch.Tensor


def has_levels(dtype: torch.dtype) -> bool:
    """Whether a cache of this dtype holds levels, which mean nothing without their scales."""
    return dtype in LARGEST_LEVEL


def quantize(rows_TGC: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(levels [T, G, C] of the dtype, scales [T, G] float32)."""
    rows_TGC = rows_TGC.float()
    peaks_TG = rows_TGC.abs().amax(-1).clamp(min=SMALLEST_PEAK)
    scales_TG = peaks_TG / LARGEST_LEVEL[dtype]
    levels_TGC = rows_TGC / scales_TG.unsqueeze(-1)
    return (levels_TGC.round() if dtype == torch.int8 else levels_TGC).to(dtype), scales_TG


def gather_blocks(
    cache_BPGC: torch.Tensor, scales_BGP: torch.Tensor | None, blocks_I: torch.Tensor
) -> torch.Tensor:
    """What the cache holds in some blocks, head by head: float32 [I, G, P, C]."""
    as_bytes = cache_BPGC.view(torch.int8) if has_levels(cache_BPGC.dtype) else cache_BPGC
    values_IGPC = as_bytes.transpose(1, 2).index_select(0, blocks_I).view(cache_BPGC.dtype).float()
    return values_IGPC if scales_BGP is None else values_IGPC * scales_BGP[blocks_I].unsqueeze(-1)

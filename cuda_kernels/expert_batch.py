"""WINT2 experts over several routed rows an expert: csrc/expert_batch.cu's launches.

R routed rows, K padded rows of the weights, F features.
"""

import torch
from torch import Tensor

from cuda_kernels.build import Variant
from cuda_kernels.expert_gemm import SortedRows
from cuda_kernels.launch import Argument, Device
from cuda_kernels.packing import PackedWint2

BATCH_ROWS = 16  # of a token tile

_WARPS, _THREADS = 16, 512
_STAGES, _SLOT_BYTES = 3, 1152  # of one warp's ring of weights: one 128-step of a pair
_CHUNK, _SLOTS = 16, 2  # steps of a chunk of the tile's tokens, and chunks of their ring
_CHUNK_BYTES = _CHUNK * (4 * 64 * BATCH_ROWS + 2 * 8 * BATCH_ROWS)
_RING_BYTES = 12 * _SLOTS + 40 + 20 * _THREADS  # the ring of chunks and each thread's place
BATCH_SHARED_BYTES = _WARPS * _STAGES * _SLOT_BYTES + _SLOTS * _CHUNK_BYTES + _RING_BYTES


def batch_projection(
    device: Device,
    packed: PackedWint2,
    rows: SortedRows,
    x: Tensor,
    out: Tensor,
    expert_weights: Tensor | None,
) -> None:
    """`out` = the projection of `x`: of tokens (gated: h bf16, by position) or of h (y float32, by slot)."""
    variant, max_tiles = _variant(packed.is_gated), rows.tiles.shape[0]
    chunks = x.new_empty((max_tiles, -(-packed.num_steps // _CHUNK), _CHUNK_BYTES), dtype=torch.uint8)
    targets = x.new_empty((max_tiles, BATCH_ROWS, 2), dtype=torch.float32)  # an int32 row, a factor
    strides = (16, 2) if packed.k_order == "natural" else (2, 8)
    convert: list[Argument] = [x, x.shape[1], packed.num_steps, *strides, rows.experts_per_token]
    convert += [expert_weights, *rows.arguments, chunks, targets]
    grid = max_tiles, BATCH_ROWS
    device.launch(variant, "fragment_tiles", grid, 256, 16, convert, overlaps=True)
    arguments: list[Argument] = [packed.records, packed.channels, packed.arithmetic, packed.super_scales]
    arguments += [packed.num_pairs, packed.num_steps, chunks, targets, rows.tiles, rows.num_tiles]
    arguments += [out, packed.num_features]
    grid = device.num_multiprocessors, 1
    device.launch(variant, "expert_batch", grid, _THREADS, BATCH_SHARED_BYTES, arguments, overlaps=True)


def batch_variants() -> list[Variant]:
    """Every variant that `batch_projection` asks for."""
    return [_variant(gated) for gated in (False, True)]


def _variant(is_gated: bool) -> Variant:
    defines = {"GATED": int(is_gated), "WARPS_K": 1, "ROWS": BATCH_ROWS, "STAGES": _STAGES}
    return Variant("expert_batch", tuple(defines.items()))

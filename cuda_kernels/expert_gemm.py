"""WINT2 experts over many routed rows: csrc/expert_gemm.cu's launches.

R routed rows, K padded rows of the weights, F features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.build import Variant
from cuda_kernels.launch import Argument, Device
from cuda_kernels.packing import PackedWint2

_PAIRS = 8  # of a panel: one a warp
_THREADS = 256
_STAGES = 4


@dataclass(frozen=True)
class GemmTiling:
    """A token tile's rows, the ring's stages, and what they take of shared memory."""

    tokens: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        return 1024 + self.stages * 2 * self.tokens * 128 + self.tokens * 12 + 32

    @property
    def num_ctas(self) -> int:
        """CTAs that share a multiprocessor."""
        return 2 if self.tokens <= 16 else 1


def choose_gemm_tiling(num_routed: int, num_experts: int, device: Device) -> GemmTiling:
    """Tiles about as large as an expert's share of the rows, in as many stages as fit up to four.

    128 tokens' sums leave registers for a warp's own products only where the warpgroup's need none.
    """
    share, limit = num_routed / num_experts, device.shared_bytes
    wanted = next(
        (n for n in (16, 32, 64) if share <= 0.75 * n), 128 if device.has_warpgroup_products else 64
    )
    tilings = [GemmTiling(n, stages) for n in (128, 64, 32, 16) if n <= wanted for stages in (_STAGES, 3)]
    for tiling in tilings:
        if tiling.shared_bytes * tiling.num_ctas <= limit:
            return tiling
    raise ValueError(f"{limit} bytes of shared memory hold no tile of {tilings[-1].tokens} rows")


@dataclass(frozen=True, eq=False)
class SortedRows:
    """Routed rows by expert, cut into token tiles; what `dispatch` of csrc/routing.cu writes."""

    sorted_R: Tensor
    tiles: Tensor
    num_tiles: Tensor
    experts_per_token: int

    @property
    def arguments(self) -> list[Argument]:
        return [self.sorted_R, self.tiles, self.num_tiles]


def gemm_projection(
    device: Device,
    packed: PackedWint2,
    tiling: GemmTiling,
    rows: SortedRows,
    x: Tensor,
    out: Tensor,
    expert_weights: Tensor | None,
) -> None:
    """`out` = the projection of `x`: of tokens (gated: h bf16, by position) or of h (y float32, by slot)."""
    halves = x.new_empty((x.shape[0], packed.num_rows), dtype=torch.float16)
    inverse = x.new_empty(x.shape[0], dtype=torch.float32)
    variant = _variant(packed.is_gated, tiling)
    strides = (16, 2) if packed.k_order == "natural" else (2, 8)
    halve: list[Argument] = [x, x.shape[1], packed.num_rows, *strides, halves, inverse]
    device.launch(variant, "halve_rows", (x.shape[0], 1), 256, 16, halve, overlaps=True)
    arguments: list[Argument] = [packed.records, packed.channels, packed.arithmetic, packed.super_scales]
    arguments += [packed.num_pairs, packed.num_steps, halves, inverse, rows.sorted_R, rows.experts_per_token]
    arguments += [rows.tiles, rows.num_tiles, out, expert_weights, packed.num_features]
    units = rows.tiles.shape[0] * -(-packed.num_pairs // _PAIRS)
    grid = min(device.num_multiprocessors * tiling.num_ctas, units)
    device.launch(variant, "expert_gemm", (grid, 1), _THREADS, tiling.shared_bytes, arguments, overlaps=True)


def gemm_variants() -> list[Variant]:
    """Every variant that `choose_gemm_tiling` asks for on a device with Hopper's shared memory."""
    tilings = [GemmTiling(tokens, _STAGES) for tokens in (16, 32, 64, 128)]
    return [_variant(gated, tiling) for gated in (False, True) for tiling in tilings]


def _variant(is_gated: bool, tiling: GemmTiling) -> Variant:
    defines = {"GATED": int(is_gated), "TOKENS": tiling.tokens, "STAGES": tiling.stages}
    return Variant("expert_gemm", tuple(defines.items()))

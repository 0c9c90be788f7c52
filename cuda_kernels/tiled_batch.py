"""x · Wᵀ with a tiled weight for more than a few rows of x: csrc/tiled_batch.cu's launches.

T tokens, K inputs, N outputs.
"""

from dataclasses import dataclass
from itertools import product

from torch import Tensor

from cuda_kernels.build import Variant
from cuda_kernels.launch import Argument, Device
from cuda_kernels.tiled import Bits, TiledWeight

_PART = 64  # of K, that a warp takes of each stage
_SUMS_STRIDE = 36
_MAX_STAGES = 4
_HOPPER_SHARED_BYTES = 232448
# Microseconds of a wave of blocks by a tile's rows and a block's pairs: 8 bits, K = 8192, an H200.
_WAVE = {(32, 4): 40, (32, 2): 25, (32, 1): 17, (64, 4): 58, (64, 2): 35, (64, 1): 24}


@dataclass(frozen=True)
class BatchTiling:
    """Rows of a tile, pairs of outputs of a block, and stages on their way."""

    bits: Bits
    rows: int
    pairs: int
    stages: int

    @property
    def warps(self) -> int:
        return 16 if self.rows == 32 else 8

    @property
    def stage_bytes(self) -> int:
        x = self.rows * self.warps // self.pairs * _PART * 2
        return x + self.warps * 32 * _PART * self.bits // 8

    @property
    def shared_bytes(self) -> int:
        return max(self.stages * self.stage_bytes, self.warps * self.rows * _SUMS_STRIDE * 4)


def choose_batch_tiling(
    bits: Bits, num_rows: int, num_pairs: int, num_multiprocessors: int, shared_limit: int
) -> BatchTiling | None:
    """The tiling whose waves of blocks take the least time; None where no two stages fit."""
    rows = 32 if num_rows <= 32 else 64
    fitting = [tiling for pairs in (4, 2, 1) if (tiling := _fit(bits, rows, pairs, shared_limit))]

    def time(tiling: BatchTiling) -> int:
        blocks = -(-num_rows // rows) * -(-num_pairs // tiling.pairs)
        return -(-blocks // num_multiprocessors) * _WAVE[rows, tiling.pairs]

    return min(fitting, key=time, default=None)


def _fit(bits: Bits, rows: int, pairs: int, shared_limit: int) -> BatchTiling | None:
    for stages in range(_MAX_STAGES, 1, -1):
        tiling = BatchTiling(bits, rows, pairs, stages)
        if tiling.shared_bytes <= shared_limit:
            return tiling
    return None


def batch_linear(
    device: Device, x_TK: Tensor, weight: TiledWeight, tiling: BatchTiling, y_TN: Tensor
) -> None:
    """y = x times the weight, transposed, after SwiGLU if it is gated."""
    arguments: list[Argument] = [weight.tiles, weight.scales, weight.num_pairs, weight.num_chunks]
    arguments += [x_TK, weight.num_inputs, x_TK.shape[0], y_TN, weight.num_features]
    grid = -(-x_TK.shape[0] // tiling.rows), -(-weight.num_pairs // tiling.pairs)
    variant, threads = _variant(tiling, weight.is_gated), 32 * tiling.warps
    device.launch(variant, "tiled_batch", grid, threads, tiling.shared_bytes, arguments, overlaps=True)


def batch_linear_variants(bits: Bits) -> list[Variant]:
    """Every variant that `choose_batch_tiling` asks for on a device with Hopper's shared memory."""
    tilings = [_fit(bits, *shape, _HOPPER_SHARED_BYTES) for shape in _WAVE]
    return [_variant(tiling, gated) for tiling, gated in product(tilings, (False, True)) if tiling]


def _variant(tiling: BatchTiling, is_gated: bool) -> Variant:
    defines = {"BITS": tiling.bits, "TOKEN_TILES": tiling.rows // 8, "OUTPUT": int(is_gated)}
    defines |= {"STAGES": tiling.stages, "WARPS": tiling.warps, "WARPS_N": tiling.pairs}
    return Variant("tiled_batch", tuple(defines.items()))

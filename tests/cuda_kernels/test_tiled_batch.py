"""Tiles of 32 and 64 rows on the host emulator, and blocks that share the K of several tiles."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_kernels import tiled_batch as op
from cuda_kernels import tiled_linear
from cuda_kernels.tiled import Bits, TiledWeight
from tests.cuda_kernels.emulator.emulator import Emulator
from tests.cuda_kernels.small_cases import Watched, weight

NUM_STAGES = 12  # of 64 rows and four pairs of 8 bits at K = 1416: the last is not full


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm())


def tiling(bits: Bits = 8, rows: int = 64, pairs: int = 4) -> op.BatchTiling:
    found = op._fit(bits, rows, pairs, Emulator.shared_bytes)
    assert found is not None
    return replace(found, shares=True)


def product(emulator: Emulator, x: Tensor, packed: TiledWeight, of: op.BatchTiling) -> Tensor:
    """NaN where no block writes."""
    y = x.new_full((len(x), packed.num_features), float("nan"))
    op.batch_linear(emulator, x, packed, of, y)
    return y


def meetings(num_tiles: int, num_blocks: int) -> list[int]:
    """How many blocks have a part of each tile, counted stage by stage."""
    total = num_tiles * NUM_STAGES
    ends = [total * (block + 1) // num_blocks for block in range(num_blocks)]
    block_of = [next(b for b, end in enumerate(ends) if stage < end) for stage in range(total)]
    return [len(set(block_of[i : i + NUM_STAGES])) for i in range(0, total, NUM_STAGES)]


@pytest.mark.parametrize(
    ("num_multiprocessors", "parts"),
    [
        (1, [1, 1, 1]),  # one block, tile after tile
        (2, [1, 2, 1]),  # which ends one and begins another
        (3, [1, 1, 1]),
        (4, [2, 2, 2]),
        (7, [3, 3, 3]),
        (8, [3, 4, 3]),
        (14, [5, 5, 5]),  # a share ends where a tile does, though the quotient is no whole number
        (36, [12, 12, 12]),
    ],
)
def test_blocks_that_share_tiles_agree_with_the_oracle(
    num_multiprocessors: int, parts: list[int], emulator: Emulator
) -> None:
    packed, x = weight(300, 1416, 8), torch.randn(60, 1416).bfloat16()
    assert meetings(3, num_multiprocessors) == parts
    of_gpu = replace(emulator, num_multiprocessors=num_multiprocessors)
    out = product(of_gpu, x, packed, tiling())
    assert relative_error(out, tiled_linear.tiled_linear(x, packed)) < 2e-3
    assert not op._counters(x.device).any()
    other_order = replace(of_gpu, seed=num_multiprocessors)  # of threads, and of blocks
    assert torch.equal(product(other_order, x, packed, tiling()), out)


@pytest.mark.parametrize(
    ("bits", "rows", "pairs", "num_tokens", "is_gated"),
    [(4, 32, 4, 20, False), (8, 64, 1, 130, True), (16, 64, 2, 70, False)],
)
def test_every_format_s_tiles_can_be_shared(
    bits: Bits, rows: int, pairs: int, num_tokens: int, is_gated: bool, emulator: Emulator
) -> None:
    packed, x = weight(216, 1416, bits, is_gated), torch.randn(num_tokens, 1416).bfloat16()
    expected, of = tiled_linear.tiled_linear(x, packed), tiling(bits, rows, pairs)
    for num_multiprocessors in (5, 11):
        of_gpu = replace(emulator, num_multiprocessors=num_multiprocessors, seed=1)
        assert relative_error(product(of_gpu, x, packed, of), expected) < 2e-3


def test_there_are_no_more_blocks_than_stages(emulator: Emulator) -> None:
    packed, x = weight(104, 72, 8), torch.randn(60, 72).bfloat16()
    out = product(replace(emulator, num_multiprocessors=50), x, packed, tiling())
    assert relative_error(out, tiled_linear.tiled_linear(x, packed)) < 2e-3


def test_many_rows_have_the_same_result_beside_others(emulator: Emulator) -> None:
    packed, x = weight(104, 712, 8), torch.randn(60, 712).bfloat16()
    together = tiled_linear.launch_tiled_linear(emulator, x, packed)
    assert torch.equal(tiled_linear.launch_tiled_linear(emulator, x[3:40], packed), together[3:40])


def chosen(num_rows: int, num_pairs: int, num_inputs: int = 8192, bits: Bits = 8) -> op.BatchTiling:
    gpu = Watched(None)
    gpu.num_multiprocessors = 132
    found = op.choose_batch_tiling(bits, num_rows, num_pairs, num_inputs, gpu)
    assert found is not None
    assert found.shared_bytes <= gpu.shared_bytes
    return found


@pytest.mark.parametrize(
    ("num_rows", "num_pairs"),
    [(64, 320), (64, 256), (64, 1792), (32, 320), (32, 1792), (128, 320)],
)
def test_tiles_that_would_leave_multiprocessors_idle_are_shared(num_rows: int, num_pairs: int) -> None:
    found = chosen(num_rows, num_pairs)
    assert found.shares
    assert (found.rows, found.pairs) == (min(num_rows, 64), 4)
    assert found.num_tiles(num_rows, num_pairs) % 132


@pytest.mark.parametrize(
    ("num_rows", "num_pairs", "num_inputs", "pairs"),
    [
        (64, 528, 8192, 4),  # one wave, full
        (128, 256, 8192, 4),  # 128 tiles
        (64, 112, 2560, 1),  # a meeting costs more than some idle multiprocessors
        (64, 320, 256, 4),
        (64, 4 * op._MAX_MEETINGS + 4, 8192, 4),  # more tiles than counters
    ],
)
def test_tiles_are_whole_where_sharing_gains_nothing(
    num_rows: int, num_pairs: int, num_inputs: int, pairs: int
) -> None:
    found = chosen(num_rows, num_pairs, num_inputs)
    assert not found.shares
    assert found.pairs == pairs


@pytest.mark.parametrize("shares", [False, True])
def test_a_launch_has_a_block_a_tile_or_one_a_multiprocessor(shares: bool) -> None:
    grids = []

    class Noted(Watched):
        def launch(self, variant, kernel, grid, *arguments, **options) -> None:  # type: ignore[no-untyped-def]
            grids.append(grid)

    packed, x = weight(300, 1416, 8), torch.zeros(130, 1416).bfloat16()
    product(Noted(None), x, packed, replace(tiling(), shares=shares))
    assert grids == [(Watched.num_multiprocessors if shares else 9, 1)]


def test_without_shared_memory_no_rows_are_shared() -> None:
    assert op.choose_batch_tiling(16, 64, 100, 712, Watched(None, shared_bytes=49152)) is None

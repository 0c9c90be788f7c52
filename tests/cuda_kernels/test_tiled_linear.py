"""Weights of 2 to 16 bits: packing, and the streaming kernels on the host emulator against the oracle."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cuda_kernels import tiled_linear as op
from cuda_kernels.formats import wint2t
from cuda_kernels.tiled import Bits, TiledWeight, pack_tiled, pack_trellis, stack_tiled, unpack_tiled
from cuda_kernels.tiled_batch import choose_batch_tiling
from tests.cuda_kernels.emulator.emulator import Emulator
from tests.cuda_kernels.generators import packed_trellis, trellis
from tests.cuda_kernels.small_cases import Watched

BITS: tuple[Bits, ...] = (4, 8, 16)


def stored(num_outputs: int, num_inputs: int, bits: Bits) -> tuple[Tensor, Tensor | None]:
    """Every level a format has, or bfloat weights."""
    if bits == 16:
        return torch.randn(num_outputs, num_inputs).bfloat16() * num_inputs**-0.5, None
    limit = 2 ** (bits - 1) - 1
    levels = torch.randint(-limit, limit + 1, (num_outputs, num_inputs), dtype=torch.int8)
    return levels, (torch.rand(num_outputs) / limit * num_inputs**-0.5).bfloat16()


def weight(num_outputs: int, num_inputs: int, bits: Bits, is_gated: bool = False) -> TiledWeight:
    levels, scale = stored(num_outputs, num_inputs, bits)
    return pack_tiled(levels, scale, bits=bits, is_gated=is_gated)


def relative_error(out: Tensor, expected: Tensor) -> float:
    return float((out.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(32, 64), (44, 72), (104, 200)])
def test_unpacking_gives_the_stored_weight(
    bits: Bits, is_gated: bool, num_outputs: int, num_inputs: int
) -> None:
    levels, scale = stored(num_outputs, num_inputs, bits)
    packed = pack_tiled(levels, scale, bits=bits, is_gated=is_gated)
    expected = levels.float() if scale is None else levels.float() * scale.float().unsqueeze(1)
    assert torch.equal(unpack_tiled(packed), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("num_tokens", "num_outputs", "num_inputs", "is_gated"),
    [
        (0, 32, 64, False),
        (1, 44, 576, False),
        (3, 64, 200, True),
        (9, 32, 640, True),
        (20, 300, 712, False),
        (70, 136, 1032, True),
    ],
)
def test_kernel_agrees_with_the_oracle(
    bits: Bits, num_tokens: int, num_outputs: int, num_inputs: int, is_gated: bool, emulator: Emulator
) -> None:
    packed, x = (
        weight(num_outputs, num_inputs, bits, is_gated),
        torch.randn(num_tokens, num_inputs).bfloat16(),
    )
    out = op.launch_tiled_linear(emulator, x, packed)
    assert out.shape == (num_tokens, packed.num_features)
    assert relative_error(out, op.tiled_linear(x, packed)) < 2e-3


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("is_gated", [False, True])
def test_dequantizing_kernel_rounds_as_the_checkpoint_s_reader(
    bits: Bits, is_gated: bool, emulator: Emulator
) -> None:
    packed = weight(88, 200, bits, is_gated)
    assert torch.equal(op.launch_untile(emulator, packed), unpack_tiled(packed).bfloat16())


def experts(count: int, hidden: int, inner: int, bits: Bits) -> tuple[TiledWeight, TiledWeight]:
    up_gate = stack_tiled([weight(2 * inner, hidden, bits, True) for _ in range(count)])
    return up_gate, stack_tiled([weight(hidden, inner, bits) for _ in range(count)])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("num_tokens", "count", "activated"), [(0, 4, 2), (1, 4, 2), (5, 6, 3), (21, 2, 2)])
def test_experts_agree_with_the_oracle(
    bits: Bits, num_tokens: int, count: int, activated: int, emulator: Emulator
) -> None:
    up_gate, down = experts(count, 136, 72, bits)
    hidden = torch.randn(num_tokens, 136).bfloat16()
    ids = torch.rand(num_tokens, count).argsort(1)[:, :activated].int().contiguous()
    weights = torch.rand(ids.shape)
    out = op.launch_moe_tiled(emulator, hidden, ids, weights, up_gate, down)
    assert relative_error(out, op.moe_tiled(hidden, ids, weights, up_gate, down)) < 3e-3


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(32, 128), (44, 72), (104, 648)])
def test_unpacking_a_trellis_gives_the_stored_weight(
    is_gated: bool, num_outputs: int, num_inputs: int
) -> None:
    experts = [trellis(num_inputs, num_outputs) for _ in range(2)]
    packed = [pack_trellis(**e.tensors(), num_inputs=num_inputs, is_gated=is_gated) for e in experts]
    together = stack_tiled(packed)
    for number, expert in enumerate(experts):
        levels, local = wint2t.unpack(expert)
        scale = local.repeat_interleave(64, dim=0) * expert.super_scales.float()
        assert torch.equal(unpack_tiled(together, number), (levels * scale)[:num_inputs].T)


@pytest.mark.parametrize(
    ("num_tokens", "count", "hidden", "inner"),
    [(1, 4, 136, 72), (9, 6, 1288, 40), (30, 2, 264, 72), (70, 2, 2184, 136)],
)
def test_trellis_experts_agree_with_the_oracle(
    num_tokens: int, count: int, hidden: int, inner: int, emulator: Emulator
) -> None:
    up_gate = stack_tiled([packed_trellis(2 * inner, hidden, True) for _ in range(count)])
    down = stack_tiled([packed_trellis(hidden, inner) for _ in range(count)])
    x, ids = torch.randn(num_tokens, hidden).bfloat16(), torch.randint(0, count - 1, (num_tokens, 1)).int()
    weights = torch.rand(ids.shape)
    out = op.launch_moe_tiled(emulator, x, ids, weights, up_gate, down)
    expected = torch.empty(num_tokens, hidden)
    for row, expert in enumerate(ids.flatten().tolist()):
        inner = op.swiglu(x[row : row + 1].float() @ as_multiplied(up_gate, expert).T, up_gate)
        expected[row] = inner.bfloat16().float() @ as_multiplied(down, expert).T * weights[row]
    assert relative_error(out, expected) < 3e-3
    assert relative_error(out, op.moe_tiled(x, ids, weights, up_gate, down)) < 6e-3  # exact weights


def as_multiplied(weight: TiledWeight, expert: int) -> Tensor:
    """The expert's weight [N, K] as the kernel rounds it: to bfloat, before its super scale."""
    plain = unpack_tiled(replace(weight, scales=None), expert)
    rounding = plain.bfloat16().float() / torch.where(plain == 0, 1.0, plain)
    return unpack_tiled(weight, expert) * rounding


def test_a_row_s_result_does_not_depend_on_its_neighbours(emulator: Emulator) -> None:
    packed, x = weight(32, 200, 8), torch.randn(9, 200).bfloat16()
    together = op.launch_tiled_linear(emulator, x, packed)
    assert torch.equal(op.launch_tiled_linear(emulator, x[3:4], packed), together[3:4])


def test_wrong_sizes_are_named(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="weight: 12 inputs, the kernel needs a multiple of 8"):
        weight(32, 12, 8)
    with pytest.raises(ValueError, match=r"x_TK: expected contiguous bfloat16 \[2, 64\]"):
        op.launch_tiled_linear(emulator, torch.zeros(2, 72).bfloat16(), weight(32, 64, 8))


@pytest.mark.parametrize(("num_blocks", "warps"), [(1, 8), (264, 8), (320, 4), (792, 4), (793, 8)])
def test_blocks_are_small_where_a_second_wave_would_be_short(num_blocks: int, warps: int) -> None:
    assert op.choose_warps(num_blocks, 2, 132) == warps


@pytest.mark.parametrize(
    ("num_pairs", "num_tiles", "pairs"), [(112, 1, 1), (256, 1, 2), (320, 1, 1), (256, 2, 4), (1792, 2, 4)]
)
def test_pairs_share_rows_where_the_gpu_stays_full(num_pairs: int, num_tiles: int, pairs: int) -> None:
    assert op.choose_pairs(num_pairs, num_tiles, 132) == pairs


def test_every_launch_has_a_variant_built_ahead() -> None:
    asked: list[tuple[object, str]] = []
    for num_multiprocessors in (1, 3, 132):
        device = Watched(None)
        device.num_multiprocessors, device.launched = num_multiprocessors, asked
        for num_tokens in (1, 9, 17, 33, 70, 200):
            for is_gated in (False, True):
                x = torch.zeros(num_tokens, 72).bfloat16()
                op.launch_tiled_linear(device, x, weight(104, 72, 8, is_gated))
    assert {variant for variant, _ in asked} <= set(op.variants(8))


@pytest.mark.parametrize(
    ("num_rows", "num_pairs", "rows", "pairs"),
    [
        (32, 320, 32, 4),
        (32, 256, 32, 2),
        (32, 80, 32, 1),
        (64, 320, 64, 4),
        (64, 256, 64, 2),
        (64, 112, 64, 1),
    ],
)
def test_a_block_has_as_many_pairs_as_fill_the_gpu(
    num_rows: int, num_pairs: int, rows: int, pairs: int
) -> None:
    tiling = choose_batch_tiling(8, num_rows, num_pairs, 132, 232448)
    assert tiling is not None
    assert (tiling.rows, tiling.pairs) == (rows, pairs)
    assert tiling.shared_bytes <= 232448


def test_without_shared_memory_no_rows_are_shared() -> None:
    assert choose_batch_tiling(16, 64, 100, 100, 49152) is None


def test_many_rows_have_the_same_result_beside_others(emulator: Emulator) -> None:
    packed, x = weight(104, 712, 8), torch.randn(60, 712).bfloat16()
    together = op.launch_tiled_linear(emulator, x, packed)
    assert torch.equal(op.launch_tiled_linear(emulator, x[3:40], packed), together[3:40])

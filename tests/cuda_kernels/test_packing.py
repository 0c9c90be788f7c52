"""Packing loses nothing, and every byte decodes to the code that the format says, whatever the arithmetic."""

import pytest
import torch

from cuda_kernels.formats import ccq, wint2
from cuda_kernels.moe_wint2 import dequantize_packed
from cuda_kernels.packing import (
    Arithmetic,
    PackedWint2,
    code_points,
    integer_constants,
    pack_wint2,
    unpack_codes,
    unpack_local_scales,
)
from tests.cuda_kernels.generators import code_parameters


def stored(num_rows: int, num_columns: int, kind: str = "any") -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [
        torch.randint(0, 256, (2, num_rows // 4, num_columns), dtype=torch.uint8),
        torch.randint(0, 256, (2, num_rows // 128, num_columns), dtype=torch.uint8),
        (torch.rand(2, num_columns) + 0.1).bfloat16(),
        *code_parameters(kind, (2, num_columns)),
    ]


@pytest.mark.parametrize(("num_rows", "num_columns"), [(128, 32), (384, 80), (640, 576)])
@pytest.mark.parametrize("is_gated", [False, True])
def test_unpacking_gives_the_stored_bytes_back(num_rows: int, num_columns: int, is_gated: bool) -> None:
    tensors = stored(num_rows, num_columns)
    packed = pack_wint2(*tensors, is_gated=is_gated)
    assert torch.equal(unpack_codes(packed), tensors[0])
    high, low = tensors[1] >> 4, tensors[1] & 15
    assert torch.equal(unpack_local_scales(packed), torch.stack([high, low], dim=2).flatten(1, 2))


@pytest.mark.parametrize("kind", ["any", "grid", "extreme"])
def test_every_byte_means_the_format_s_code(kind: str) -> None:
    tensors = stored(128, 96, kind)
    packed = pack_wint2(*tensors, is_gated=False)
    for expert in range(2):
        expected = ccq.code_points(tensors[3][expert], tensors[4][expert])
        assert torch.equal(code_points(packed)[expert], expected)


def test_the_arithmetic_is_the_cheapest_that_is_exact() -> None:
    def kinds(kind: str) -> set[int]:
        return set(pack_wint2(*stored(128, 1024, kind), is_gated=False).arithmetic.unique().tolist())

    assert kinds("grid") == {Arithmetic.SHORT}
    assert Arithmetic.INTEGERS in kinds("any")
    assert kinds("extreme") == {Arithmetic.FLOATS, Arithmetic.WIDE_FLOATS}


def test_searched_integers_are_exact_for_nearly_all_channels() -> None:
    torch.manual_seed(0)
    scale, zp = code_parameters("any", (4000,))
    a, b, found = integer_constants(scale, zp, 17)
    byte = torch.arange(256).unsqueeze(1)
    codes = (byte * a + b >> 17 & ccq.CODE_MASK).short()
    assert torch.equal(codes[:, found], ccq.code_points(scale, zp)[:, found])
    assert found.double().mean() > 0.999


def test_no_short_multiplier_is_missed_by_searching_near_the_scale_only() -> None:
    torch.manual_seed(0)
    scale, zp = code_parameters("any", (300,))
    _, _, found = integer_constants(scale, zp, 9)
    byte = torch.arange(256).unsqueeze(1)
    codes = ccq.fma(*torch.broadcast_tensors(byte.float(), scale, zp + 0.5)).floor().long()
    for distance in range(-64, 65):
        multiplier = (scale.double() * 512).round().long() + distance
        least = (codes << 9) - byte * multiplier
        assert not ((least.amax(0) <= least.amin(0) + 511) & ~found).any(), distance


@pytest.mark.parametrize("k_order", ["natural", "shuffled"])
def test_dequantized_weights_are_the_format_s_but_for_their_rounding(k_order: str) -> None:
    tensors = stored(256, 96)
    packed = pack_wint2(*tensors, is_gated=True, k_order=k_order)
    for expert in range(2):
        expected = wint2.dequantize(*(t[expert] for t in tensors), k_order=k_order, scale_rounding="fp32")
        torch.testing.assert_close(dequantize_packed(packed, expert).bfloat16(), expected, rtol=2**-7, atol=0)


def test_padded_columns_weigh_nothing() -> None:
    packed = pack_wint2(*stored(128, 40), is_gated=False)
    assert packed.num_pairs == 2
    assert packed.super_scales.flatten(1)[:, 40:].eq(0).all()


def test_rows_that_are_no_whole_step_are_refused() -> None:
    codes = torch.zeros(1, 48, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"192 rows, need a multiple of 128"):
        pack_wint2(codes, *stored(128, 32)[1:], is_gated=False)


def test_moving_keeps_everything() -> None:
    packed: PackedWint2 = pack_wint2(*stored(128, 32), is_gated=False)
    assert torch.equal(packed.to("cpu").records, packed.records)

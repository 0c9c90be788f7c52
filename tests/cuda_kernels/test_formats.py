"""Every format there and back over generated weights, and what it says to a weight it cannot hold."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_kernels.formats import ccq, wint2, wint2t, wint4, wint8, wint25, wint275
from cuda_kernels.formats.codebooks import CODEBOOKS
from cuda_kernels.formats.layout import FormatError, pad_rows, to_rows, to_slots

SEEDS = st.integers(0, 2**32 - 1)
GROUPS, COLUMNS = st.integers(1, 4), st.integers(1, 9)
K_ORDERS = st.sampled_from(["shuffled", "natural"])
FEW = settings(max_examples=25, deadline=None)


def integers(shape, high, seed, dtype=torch.uint8):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bf16(columns, seed):
    return torch.rand(columns, generator=torch.Generator().manual_seed(seed)).bfloat16() * 0.01


@FEW
@given(GROUPS, COLUMNS, K_ORDERS, st.sampled_from(["bf16", "fp32"]), SEEDS)
def test_wint2_bytes_to_levels_to_weights(groups, columns, k_order, rounding, seed):
    codes = integers((32 * groups, columns), 256, seed)
    local = integers((2 * groups, columns), 16, seed + 1)
    scale = 64 + 64 * torch.rand(columns, generator=torch.Generator().manual_seed(seed))
    stored = wint2.pack(codes, local, bf16(columns, seed), scale, torch.full((columns,), 17.4))
    levels, found = wint2.unpack(stored, k_order=k_order)
    assert torch.equal(found, local)
    product = local.float() * stored.super_scales.float()
    scales = product.bfloat16().float() if rounding == "bf16" else product
    expected = (levels.float() * scales.repeat_interleave(64, dim=0)).bfloat16()
    decoded = wint2.dequantize(*stored.tensors().values(), k_order=k_order, scale_rounding=rounding)
    assert torch.equal(decoded, expected)
    assert stored.shape == decoded.shape == (128 * groups, columns)


@FEW
@given(GROUPS, COLUMNS, K_ORDERS, SEEDS)
def test_rows_and_slots_are_each_others_inverse(groups, columns, k_order, seed):
    rows = integers((64 * groups, columns), 256, seed)
    assert torch.equal(to_rows(to_slots(rows, k_order), k_order), rows)
    assert torch.equal(to_slots(to_rows(rows, k_order), k_order), rows)


def test_a_slot_holds_the_row_of_the_drawing():
    slots = to_slots(torch.arange(64).unsqueeze(1), "shuffled").squeeze(1).tolist()
    assert slots == [8 * b + 2 * a + c for a in range(4) for b in range(8) for c in range(2)]


@pytest.mark.parametrize("pair", CODEBOOKS)
def test_every_codebook_decodes_alike_in_all_roundings_and_in_integers(pair):
    byte = torch.arange(256, dtype=torch.float32)
    scale, zp = torch.tensor(pair[0]), torch.tensor(pair[1])
    fused = ccq.code_points(scale.view(1), zp.view(1)).squeeze(1).long()
    two_steps = (byte * scale + zp + 0.5).floor().long()
    exact = (torch.arange(256) * int(pair[0] * 128) + int(pair[1] * 128) + 64) >> 7
    assert torch.equal(fused, two_steps)
    assert torch.equal(fused, exact)
    assert exact.max() < 2**15


@FEW
@given(GROUPS, COLUMNS, SEEDS)
def test_wint25_words_there_and_back(groups, columns, seed):
    words = integers((10 * groups, columns), 2**16, seed, torch.int64)
    words = torch.where(words > 0x7FFF, words - 0x10000, words).to(torch.int16)
    stored = wint25.Wint25Weight(words, bf16(columns, seed))
    assert torch.equal(wint25.pack(*wint25.unpack(stored), stored.super_scales).quant_weight, words)


@FEW
@given(GROUPS, COLUMNS, SEEDS)
def test_wint275_bytes_there_and_back(groups, columns, seed):
    stored = wint275.Wint275Weight(integers((22 * groups, columns), 256, seed), bf16(columns, seed))
    packed = wint275.pack(*wint275.unpack(stored), stored.super_scales)
    assert torch.equal(packed.quant_weight, stored.quant_weight)


@FEW
@given(GROUPS, COLUMNS, SEEDS)
def test_paddles_layouts_there_and_back(groups, columns, seed):
    signed = lambda high: integers((64 * groups, 4 * columns), 2 * high, seed, torch.int16) - high  # noqa: E731
    for module, high in ((wint8, 128), (wint4, 8)):
        levels = signed(high).to(torch.int8)
        assert torch.equal(module.unpack(module.pack(levels)), levels)


@FEW
@given(GROUPS, COLUMNS, SEEDS)
def test_wint2t_symbols_there_and_back(groups, columns, seed):
    symbols = integers((128 * groups, columns), 4, seed)
    local = integers((2 * groups, columns), 16, seed + 1)
    levels, found = wint2t.unpack(wint2t.pack(symbols, local, bf16(columns, seed)))
    assert torch.equal(found, local)
    assert levels[:, 0].tolist() == walk(symbols[:, 0].tolist())


def walk(symbols):
    """The levels of one column, state by state."""
    state, levels = 0, []
    for symbol in symbols:
        state = (state << 2 | symbol) & 0xFFFF
        word = (state * 34038481 + 76625530) % 2**32
        levels.append(sum(word.to_bytes(4, "little")) - 510)
    return levels


@pytest.mark.parametrize(("module", "most"), [(wint25, 0.105), (wint275, 0.09), (wint4, 0.03), (wint8, 1e-4)])
def test_quantizing_keeps_most_of_a_gaussian_weight(module, most):
    weight = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    stored = module.quantize(weight)
    error = weight - module.dequantize(*vars(stored).values()).float()
    assert error.square().mean() / weight.square().mean() < most


@pytest.mark.parametrize("module", [wint2, wint2t, wint25, wint275, wint4, wint8])
def test_zero_columns_stay_zero(module):
    weight = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
    weight[:, ::2] = 0
    decoded = module.dequantize(*vars(module.quantize(weight)).values())
    assert torch.isfinite(decoded).all()
    assert (decoded[:, ::2] == 0).all()
    assert torch.equal(
        module.dequantize(*vars(module.quantize(0 * weight)).values()), (0 * weight).bfloat16()
    )


@pytest.mark.parametrize("module", [wint2, wint2t, wint25, wint275, wint4, wint8])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(127, 4), "127 rows, need a positive multiple of"),
        (torch.zeros(0, 4), "0 rows"),
        (torch.zeros(128), r"expected a floating \[K, N\], got torch.float32 \[128\]"),
        (torch.zeros(128, 4, dtype=torch.int32), "torch.int32"),
        (torch.full((128, 4), torch.nan), "512 of 512 values are NaN or infinite"),
        (torch.full((128, 4), -torch.inf), "512 of 512 values are NaN or infinite"),
    ],
)
def test_what_cannot_be_quantized_is_named(module, weight, message):
    with pytest.raises(FormatError, match=message):
        module.quantize(weight)


def test_stored_tensors_of_wrong_shapes_are_named():
    stored = wint2.quantize(torch.zeros(128, 4)).tensors()
    with pytest.raises(FormatError, match=r"weight_scale: expected torch.uint8 \[1, 4\], got .* \[1, 3\]"):
        wint2.dequantize(**stored | {"weight_scale": stored["weight_scale"][:, :3]})
    with pytest.raises(FormatError, match="code_zp: expected"):
        wint2.dequantize(**stored | {"code_zp": stored["code_zp"].double()})
    with pytest.raises(FormatError, match="k_order: expected 'shuffled' or 'natural', got 'sideways'"):
        wint2.dequantize(**stored, k_order="sideways")
    with pytest.raises(FormatError, match="scale_rounding"):
        wint2.dequantize(**stored, scale_rounding="up")
    with pytest.raises(FormatError, match=r"hessian: expected .* \[128, 128\], got .* \[64, 64\]"):
        wint2.quantize(torch.zeros(128, 4), hessian=torch.eye(64))
    with pytest.raises(FormatError, match="effort: expected one of fast, normal, best"):
        wint2.quantize(torch.zeros(128, 4), effort="more")


def test_padding_appends_zero_rows():
    padded = pad_rows(torch.ones(130, 2))
    assert padded.shape == (256, 2)
    assert padded.sum() == 260

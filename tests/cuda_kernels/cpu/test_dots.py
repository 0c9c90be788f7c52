"""Integer kernels against x rounded to 8 bits and the decoded weight, and a row's bits in any company."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cuda_kernels.cpu import ops, panels
from cuda_kernels.cpu.quantized import GROUP_BYTES, quantize_rows
from cuda_kernels.cpu.vector import has_dot4
from tests.cuda_kernels.cpu.test_panels import make, reference

needs_dot4 = pytest.mark.skipif(not has_dot4(), reason="this CPU has no AVX-512 VNNI")
GROUP = 64


def integer(weight):
    return replace(weight, activations="int8")


def rounded(x):
    """[T, K] by the definition: levels to ±127 of the largest of 64 values."""
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP)).double()
    scale = groups.abs().amax(-1, keepdim=True) / 127
    return ((groups / scale.clamp(min=1e-30)).round() * scale).flatten(1)[:, : x.shape[1]]


def levels_of(x):
    """(levels [T, K], scales [T, K / 64], sums [T, K / 64]) as the kernels read them."""
    rows, width = x.shape
    groups = quantize_rows(x.data_ptr(), 4 * width, rows, width).reshape(rows, -1, GROUP_BYTES)
    scales = groups[..., GROUP : GROUP + 4].copy().view(np.float32)
    sums = -groups[..., GROUP + 4 :].copy().view(np.int32)
    levels = groups[..., :GROUP].copy().view(np.int8)
    return tuple(map(torch.from_numpy, (levels, scales, sums)))


def test_a_group_is_levels_their_scale_and_their_sum():
    x = torch.randn(5, 3 * GROUP)
    x[0, :GROUP] = 0
    levels, scales, sums = levels_of(x)
    assert torch.allclose((levels * scales).flatten(1).double(), rounded(x), atol=1e-6)
    assert torch.equal(levels.sum(-1, keepdim=True, dtype=torch.int32), sums)
    assert levels.abs().amax(-1).tolist() == [[0, 127, 127], *([[127] * 3] * 4)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 17, 63])
def test_a_group_with_no_number_in_it_has_no_numbers(bad, at):
    x = torch.randn(1, 2 * GROUP)
    x[0, at] = bad
    _, scales, _ = levels_of(x)
    assert scales.isfinite().flatten().tolist() == [False, True]


@needs_dot4
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (72, 8), (576, 130)])
def test_linear_is_the_product_of_the_rounded_rows_and_keeps_a_row_s_bits(inputs, outputs):
    weight, dense = make("wint8", inputs, outputs)
    x = torch.randn(29, inputs)
    whole = ops.linear(x, integer(weight))
    expected = rounded(x) @ dense
    assert (whole.double() - expected).abs().max() < 3e-6 * expected.abs().max()
    for size in (1, 2, 3, 5, 12):
        assert torch.equal(torch.cat([ops.linear(part, integer(weight)) for part in x.split(size)]), whole)


@needs_dot4
@pytest.mark.parametrize("name", ["wint8", "wint4", "wint2"])
@pytest.mark.parametrize("k_order", ["shuffled", "natural"])
@pytest.mark.parametrize(("num_experts", "activated", "width", "inner"), [(5, 2, 72, 40), (4, 4, 192, 128)])
def test_experts_are_near_the_decoded_weights_and_keep_a_token_s_bits(
    name, k_order, num_experts, activated, width, inner
):
    shapes = [(width, inner), (width, inner), (inner, width)]
    made = [[make(name, k, n, k_order) for k, n in shapes] for _ in range(num_experts)]
    packed = [panels.PanelExpert(*(integer(weight) for weight, _ in one)) for one in made]
    experts = panels.stack_experts(packed, k_order)
    hidden, weights = torch.randn(31, width), torch.rand(31, activated)
    ids = torch.stack([torch.randperm(num_experts)[:activated] for _ in range(31)]).int()
    whole = ops.experts(hidden, experts, ids, weights)
    expected = reference([[weight for _, weight in one] for one in made], hidden, ids, weights)
    assert (whole.double() - expected).norm() < 0.015 * expected.norm()
    for size in (1, 2, 7, 16):
        parts = zip(hidden.split(size), ids.split(size), weights.split(size), strict=True)
        assert torch.equal(torch.cat([ops.experts(h, experts, i, w) for h, i, w in parts]), whole)


@needs_dot4
def test_one_row_that_is_no_number_leaves_the_others_alone():
    weight, _ = make("wint8", 128, 64)
    x = torch.randn(6, 128)
    clean = ops.linear(x, integer(weight))
    x[3, 100] = float("nan")
    spoilt = ops.linear(x, integer(weight))
    assert spoilt[3].isnan().all()
    assert torch.equal(spoilt[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]])


def test_floats_stay_floats():
    weight, _ = make("bfloat16", 64, 64)
    assert not integer(weight).quantizes

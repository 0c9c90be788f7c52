"""Panel products in every format against the decoded weight, and a row's bits in any company."""

import pytest
import torch
import torch.nn.functional as F

from cuda_kernels.cpu import ops, panels
from cuda_kernels.formats import wint2, wint4, wint8
from cuda_kernels.formats.layout import pad_rows


def exact_wint2(stored, k_order):
    levels, local = wint2.unpack(stored, k_order=k_order)
    return levels.double() * local.double().repeat_interleave(64, 0) * stored.super_scales.double()


def random_wint2(rows, columns):
    """Any bytes are a weight."""
    codes, scales = (torch.randint(256, (rows // n, columns), dtype=torch.uint8) for n in (4, 128))
    code_scale, code_zp = 100 + 28 * torch.rand(columns), 1000 * torch.rand(columns) - 200
    return wint2.Wint2Weight(codes, scales, (torch.rand(columns) / 100).bfloat16(), code_scale, code_zp)


def make(name, inputs, outputs, k_order="shuffled"):
    """(panel weight, the weights it stands for as float64 [K, N])."""
    weight = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(inputs + outputs))
    if name == "narrow":
        return panels.pack_narrow(weight.T), weight.double()
    if name in ("float32", "bfloat16"):
        weight = weight.to(getattr(torch, name))
        return panels.pack_dense(weight.T), weight.double()
    if name == "wint2":
        stored = random_wint2(inputs + -inputs % 128, outputs)
        return panels.pack_wint2(stored, inputs), exact_wint2(stored, k_order)[:inputs]
    module, pack = {"wint8": (wint8, panels.pack_wint8), "wint4": (wint4, panels.pack_wint4)}[name]
    stored = module.quantize(pad_rows(weight, 64))
    dense = stored.quant_weight.double() * stored.weight_scale.double()
    return pack(stored, inputs), dense[:inputs]


def assert_near(result, expected):
    assert (result.double() - expected).abs().max() < 3e-6 * expected.abs().max()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "wint8"])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (72, 8), (576, 130)])
def test_linear_matches_the_decoded_weight_and_keeps_a_row_s_bits(name, inputs, outputs):
    weight, dense = make(name, inputs, outputs)
    x = torch.randn(29, inputs)
    whole = ops.linear(x, weight)
    assert_near(whole, x.double() @ dense)
    for size in (1, 2, 3, 5, 12):
        assert torch.equal(torch.cat([ops.linear(part, weight) for part in x.split(size)]), whole)


@pytest.mark.parametrize("outputs", [1, 8, 16])
def test_a_narrow_weight_has_the_bits_of_one_in_whole_panels(outputs):
    narrow, dense = make("narrow", 72, outputs)
    wide, _ = make("float32", 72, outputs)
    x = torch.randn(29, 72)
    assert torch.equal(ops.linear(x, narrow), ops.linear(x, wide))
    assert_near(ops.linear(x, narrow), x.double() @ dense)
    assert narrow.nbytes * 4 == wide.nbytes


def reference(experts, hidden, ids, weights):
    out = torch.zeros(hidden.shape, dtype=torch.float64)
    for t, (row_ids, row_weights) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(row_ids, row_weights, strict=True):
            gate, up, down = experts[expert]
            x = hidden[t].double()
            out[t] += weight * (F.silu(x @ gate) * (x @ up)) @ down
    return out


@pytest.mark.parametrize("name", ["float32", "bfloat16", "wint8", "wint4", "wint2"])
@pytest.mark.parametrize("k_order", ["shuffled", "natural"])
@pytest.mark.parametrize(("num_experts", "activated", "width", "inner"), [(5, 2, 72, 40), (4, 4, 192, 128)])
def test_experts_match_the_decoded_weights_and_keep_a_token_s_bits(
    name, k_order, num_experts, activated, width, inner
):
    shapes = [(width, inner), (width, inner), (inner, width)]
    made = [[make(name, k, n, k_order) for k, n in shapes] for _ in range(num_experts)]
    packed = [panels.PanelExpert(*(weight for weight, _ in one)) for one in made]
    experts = panels.stack_experts(packed, k_order)
    tokens = 31
    hidden, weights = torch.randn(tokens, width), torch.rand(tokens, activated)
    ids = torch.stack([torch.randperm(num_experts)[:activated] for _ in range(tokens)]).int()
    whole = ops.experts(hidden, experts, ids, weights)
    dense = [[weight for _, weight in one] for one in made]
    assert_near(whole, reference(dense, hidden, ids, weights))
    for size in (1, 2, 7, 16):
        parts = zip(hidden.split(size), ids.split(size), weights.split(size), strict=True)
        assert torch.equal(torch.cat([ops.experts(h, experts, i, w) for h, i, w in parts]), whole)


def test_one_network_is_an_expert_that_every_token_takes():
    made = [make("wint8", k, n) for k, n in [(64, 128), (64, 128), (128, 64)]]
    network = panels.stack_experts([panels.PanelExpert(*(weight for weight, _ in made))], "shuffled")
    hidden = torch.randn(9, 64)
    ids, weights = torch.zeros(9, 1, dtype=torch.int32), torch.ones(9, 1)
    expected = reference([[weight for _, weight in made]], hidden, ids, weights)
    assert_near(ops.experts(hidden, network), expected)


def test_wint2_is_held_in_little_more_than_it_is_stored():
    weight, _ = make("wint2", 1024, 256)
    assert 8 * weight.nbytes < 2.2 * 1024 * 256


def test_no_rows():
    weight, _ = make("wint8", 64, 64)
    assert ops.linear(torch.empty(0, 64), weight).shape == (0, 64)

"""The dense mixture-of-experts op against one expert after another, and its bits in any company."""

import pytest
import torch
import torch.nn.functional as F

from cuda_kernels.moe import moe_ffn, pack_experts, silu_and_mul


def make(num_experts, activated, hidden=48, inner=32, tokens=21):
    torch.manual_seed(0)
    experts = [
        (torch.randn(2 * inner, hidden) / 7, torch.randn(hidden, inner) / 6) for _ in range(num_experts)
    ]
    ids = torch.stack([torch.randperm(num_experts)[:activated] for _ in range(tokens)]).int()
    return experts, torch.randn(tokens, hidden), ids, torch.rand(tokens, activated)


def reference(experts, hidden, ids, weights):
    out = torch.zeros_like(hidden, dtype=torch.float64)
    for t, (row_ids, row_weights) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, weight in zip(row_ids, row_weights, strict=True):
            up_gate, down = (w.double() for w in experts[expert])
            gate, up = (up_gate @ hidden[t].double()).chunk(2)
            out[t] += weight * (down @ (F.silu(gate) * up))
    return out


# (8, 8): every expert active, merged into one network.
@pytest.mark.parametrize(("num_experts", "activated"), [(1, 1), (4, 1), (6, 2), (64, 8), (8, 8)])
def test_matches_expert_by_expert(num_experts, activated):
    experts, hidden, ids, weights = make(num_experts, activated)
    packed = pack_experts(iter(experts), num_experts, activated)
    assert packed.is_merged == (num_experts == activated)
    out = moe_ffn(hidden, ids, weights, packed)
    torch.testing.assert_close(out.double(), reference(experts, hidden, ids, weights), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("num_experts", "activated"), [(6, 2), (8, 8)])
def test_a_token_has_the_same_bits_in_any_company(num_experts, activated):
    experts, hidden, ids, weights = make(num_experts, activated, tokens=40)
    packed = pack_experts(experts, num_experts, activated)
    whole = moe_ffn(hidden, ids, weights, packed)
    for size in (1, 2, 7, 16):
        parts = zip(hidden.split(size), ids.split(size), weights.split(size), strict=True)
        assert torch.equal(torch.cat([moe_ffn(*part, packed) for part in parts]), whole)


@pytest.mark.parametrize("activated", [2, 4])
def test_no_tokens(activated):
    experts, hidden, ids, weights = make(4, activated, tokens=1)
    out = moe_ffn(hidden[:0], ids[:0], weights[:0], pack_experts(experts, 4, activated))
    assert out.shape == (0, 48)


def test_reports_its_size():
    experts, *_ = make(4, 2)
    expected = 4 * (2 * 32 * 48 + 48 * 32) * 4
    assert pack_experts(experts, 4, 2).nbytes == pack_experts(experts, 4, 4).nbytes == expected


def test_silu_and_mul_takes_the_gate_first():
    assert torch.equal(silu_and_mul(torch.tensor([[1.0, 3.0]])), F.silu(torch.tensor([[1.0]])) * 3)

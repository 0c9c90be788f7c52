"""RMS normalization against its definition."""

import pytest
import torch

from cuda_kernels.norm import add_rms_norm, rms_norm


def reference(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 100), (17, 8192)])
def test_matches_the_definition(shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape) * 5, torch.randn(shape[1])
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5).double(), reference(x, weight, 1e-5), atol=1e-5, rtol=1e-5
    )


def test_eps_keeps_a_zero_row_finite():
    assert torch.equal(rms_norm(torch.zeros(1, 8), torch.ones(8), 1e-5), torch.zeros(1, 8))


def test_bfloat16_is_rounded_once_before_the_weight():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64).bfloat16()
    normed = reference(x, torch.ones(64), 1e-5).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), normed * weight)


def test_add_rms_norm_returns_the_sum_too():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert torch.equal(normed, rms_norm(total, weight, 1e-5))


def test_a_token_has_the_same_bits_in_any_company():
    torch.manual_seed(0)
    x, weight = torch.randn(33, 577), torch.randn(577)
    alone = torch.cat([rms_norm(row, weight, 1e-5) for row in x.split(1)])
    assert torch.equal(rms_norm(x, weight, 1e-5), alone)

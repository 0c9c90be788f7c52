"""Rotary embedding against its definition with complex numbers' angles in float64."""

import math

import pytest
import torch

from cuda_kernels.rope import cos_sin_table, rope


def reference(x_THC, positions, theta, ratio=1.0):
    x, head_dim = x_THC.double(), x_THC.shape[-1]
    out = torch.empty_like(x)
    for t, position in enumerate(positions.tolist()):
        for i in range(head_dim // 2):
            angle = position / ratio * theta ** (-2 * i / head_dim)
            even, odd = x[t, :, 2 * i], x[t, :, 2 * i + 1]
            out[t, :, 2 * i] = even * math.cos(angle) - odd * math.sin(angle)
            out[t, :, 2 * i + 1] = odd * math.cos(angle) + even * math.sin(angle)
    return out


@pytest.mark.parametrize("ratio", [1.0, 2.0])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(1, 1, 2), (6, 2, 16), (9, 3, 64)])
def test_matches_the_definition(heads, kv_heads, head_dim, ratio):
    torch.manual_seed(0)
    positions = torch.tensor([0, 1, 5, 400])
    query, key = torch.randn(4, heads, head_dim), torch.randn(4, kv_heads, head_dim)
    expected = [reference(x, positions, 10000.0, ratio) for x in (query, key)]
    table = cos_sin_table(401, head_dim, 10000.0, compression_ratio=ratio)
    for out, want in zip(rope(query, key, positions, table), expected, strict=True):
        torch.testing.assert_close(out.double(), want, atol=1e-4, rtol=1e-4)


def test_the_table_is_cosines_then_sines():
    table = cos_sin_table(8, 4, 100.0)
    assert table.shape == (8, 4)
    expected = [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]
    torch.testing.assert_close(table[3], torch.tensor(expected))


def test_keeps_the_dtype_and_the_length_of_a_vector():
    torch.manual_seed(0)
    query = torch.randn(3, 2, 32).bfloat16()
    out, _ = rope(query.clone(), query.clone(), torch.tensor([7, 8, 9]), cos_sin_table(10, 32, 1e4))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float().norm(dim=-1), query.float().norm(dim=-1), rtol=0.01, atol=0.01)


def test_a_token_has_the_same_bits_in_any_company():
    torch.manual_seed(0)
    fused, positions, table = torch.randn(9, 5, 16), torch.arange(9), cos_sin_table(9, 16, 1e4)
    whole = rope(fused[:, :4], fused[:, 4:], positions, table)
    for t in range(9):
        one = slice(t, t + 1)
        alone = rope(fused[one, :4], fused[one, 4:], positions[one], table)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, whole, strict=True))


def test_takes_views_of_a_fused_projection():
    torch.manual_seed(0)
    fused = torch.randn(5, 4, 8)
    positions, table = torch.arange(5), cos_sin_table(5, 8, 1e4)
    expected = rope(fused[:, :3].clone(), fused[:, 3:].clone(), positions, table)
    for out, want in zip(rope(fused[:, :3], fused[:, 3:], positions, table), expected, strict=True):
        assert torch.equal(out, want)

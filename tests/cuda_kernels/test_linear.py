"""The dense linear op: values, and bits that do not depend on the other rows."""

import pytest
import torch
import torch.nn.functional as F

from cuda_kernels import linear as op
from cuda_kernels.linear import linear, pack_dense


@pytest.fixture(params=["packed", "plain"])
def pack(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(op, "_can_pack", lambda weight: False)
    return pack_dense


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 17])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (10, 12), (300, 100), (576, 1536)])
def test_matches_torch(pack, rows, outputs, inputs):
    torch.manual_seed(0)
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs)
    torch.testing.assert_close(linear(x, pack(weight)), F.linear(x, weight), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("outputs", "inputs"), [(10, 12), (300, 100), (576, 1536), (96, 4096)])
def test_a_row_has_the_same_bits_beside_any_other_rows(pack, outputs, inputs):
    torch.manual_seed(0)
    weight, x = pack(torch.randn(outputs, inputs)), torch.randn(200, inputs)
    whole = linear(x, weight)
    for size in (1, 2, 3, 4, 5, 8, 13, 16, 31, 64, 100):
        parts = torch.cat([linear(part, weight) for part in x.split(size)])
        assert torch.equal(parts, whole), size


def test_bfloat16():
    torch.manual_seed(0)
    weight, x = torch.randn(64, 96).bfloat16(), torch.randn(5, 96).bfloat16()
    out = linear(x, pack_dense(weight))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), x.float() @ weight.float().T, atol=0.1, rtol=0.02)


def test_a_transposed_weight_is_packed_as_its_values():
    torch.manual_seed(0)
    weight, x = torch.randn(48, 32).T, torch.randn(3, 48)
    torch.testing.assert_close(linear(x, pack_dense(weight)), x @ weight.T, atol=1e-5, rtol=1e-5)


def test_wrong_width_names_both():
    with pytest.raises(ValueError, match="x has 7 features, the weight takes 8"):
        linear(torch.zeros(1, 7), pack_dense(torch.zeros(4, 8)))


def test_reports_its_size():
    assert pack_dense(torch.zeros(4, 8)).nbytes == 4 * 8 * 4

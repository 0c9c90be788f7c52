"""Which experts, in which order, with what weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_kernels.routing import route


@pytest.mark.parametrize(("num_experts", "activated"), [(1, 1), (4, 2), (64, 8), (8, 8)])
def test_matches_topk_of_the_biased_softmax(num_experts, activated):
    torch.manual_seed(0)
    logits, bias = torch.randn(50, num_experts), 0.1 * torch.randn(num_experts)
    ids, weights = route(logits, bias, activated, 1e-12)
    probabilities = logits.softmax(-1)
    expected = (probabilities + bias).topk(activated).indices
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    assert torch.equal(ids.long(), expected)
    chosen = probabilities.gather(1, expected)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))


@given(st.integers(1, 16), st.data())
def test_ties_go_to_the_lower_id(num_experts, data):
    activated = data.draw(st.integers(1, num_experts))
    ids, weights = route(torch.zeros(3, num_experts), torch.zeros(num_experts), activated, 1e-12)
    assert ids.tolist() == [list(range(activated))] * 3
    torch.testing.assert_close(weights, torch.full((3, activated), 1 / activated))


def test_the_bias_chooses_but_does_not_weigh():
    ids, weights = route(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0.0, 0.0, 1.0]), 2, 1e-12)
    assert ids.tolist() == [[2, 0]]
    probabilities = torch.tensor([2.0, 1.0, 0.0]).softmax(0)[[2, 0]]
    torch.testing.assert_close(weights[0], probabilities / probabilities.sum())


def test_norm_min_bounds_the_divisor():
    _, weights = route(torch.zeros(1, 4), torch.zeros(4), 1, 0.5)
    assert weights.tolist() == [[0.5]]


def test_no_tokens():
    ids, weights = route(torch.empty(0, 4), torch.zeros(4), 2, 1e-12)
    assert ids.shape == weights.shape == (0, 2)

"""Drawing tokens and penalties: plain torch against the definition, compiled code and kernels against it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_kernels import sampling
from tests.cuda_kernels.emulator.emulator import Emulator

GRID = 4096


def wishes(count: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> sampling.Wishes:
    top_k = torch.full((count,), top_k, dtype=torch.int32)
    others = (torch.full((count,), float(value)) for value in (temperature, top_p, min_p))
    return sampling.Wishes(next(others), top_k, *others)


def evenly(count: int) -> torch.Tensor:
    """Uniform numbers, one in each of `count` equal parts."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def reference(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Probabilities after temperature, top_k, top_p and min_p, the slow and plain way."""
    probs = np.exp((logits - logits.max()) / temperature)
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    kept = order[: top_k or len(order)]
    mass = np.cumsum(probs[kept]) / probs[kept].sum()
    kept = kept[: int(np.searchsorted(mass, top_p)) + 1]
    kept = kept[probs[kept] >= min_p * probs.max()]
    result = np.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


@pytest.mark.parametrize("op", [sampling.draw, sampling.draw_plainly])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab_size=st.sampled_from([1, 2, 17, 300]),
    temperature=st.floats(0.1, 2.0),
    top_k=st.sampled_from([0, 1, 2, 10, 299, 1000]),
    top_p=st.floats(0.01, 1.0),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_the_drawn_distribution(op, seed, vocab_size, temperature, top_k, top_p, min_p):
    logits = (np.random.default_rng(seed).normal(size=vocab_size) * 2).astype(np.float32)
    rows = torch.tensor(logits).expand(GRID, -1).contiguous()
    token_ids, peaks = op(rows, wishes(GRID, temperature, top_k, top_p, min_p), evenly(GRID))
    frequencies = np.bincount(token_ids.numpy(), minlength=vocab_size) / GRID
    expected = reference(logits.astype(np.float64), temperature, top_k, np.float32(top_p), min_p)
    assert np.abs(frequencies - expected).max() <= 2 / GRID
    assert (peaks == logits.max()).all()


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"top_p": 0.9},
    {"top_k": 7},
    {"top_k": 40, "top_p": 0.5, "temperature": 1.7},
    {"min_p": 0.2},
    {"top_p": 0.999, "temperature": 2.0},
]


def mixed(vocab_size: int, scale: float):
    """The op's arguments: a row of logits for each kind of wish."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(len(MIXED), vocab_size, generator=generator) * scale
    uniform = torch.rand(len(MIXED), dtype=torch.float64, generator=generator)
    columns = zip(*(wishes(1, **one) for one in MIXED), strict=True)
    return logits, sampling.Wishes(*map(torch.cat, columns)), uniform


def one_of(logits: torch.Tensor, columns: sampling.Wishes, uniform: torch.Tensor, i: int):
    """The arguments for one row alone."""
    one = slice(i, i + 1)
    return logits[one], sampling.Wishes(*(column[one] for column in columns)), uniform[one]


@pytest.mark.parametrize("scale", [0.01, 3.0])
@pytest.mark.parametrize("vocab_size", [1, 31, 1000, 5003])
def test_compiled_draws_are_those_of_plain_torch_in_any_company(vocab_size, scale):
    arguments = mixed(vocab_size, scale)
    token_ids, peaks = sampling.draw(*arguments)
    plain_ids, plain_peaks = sampling.draw_plainly(*arguments)
    assert torch.equal(token_ids, plain_ids)
    assert torch.equal(peaks, plain_peaks)
    for i in range(len(MIXED)):
        assert sampling.draw(*one_of(*arguments, i))[0] == token_ids[i]


@pytest.mark.parametrize(("vocab_size", "scale"), [(1, 1.0), (31, 3.0), (300, 0.01), (700, 3.0)])
def test_the_kernel_draws_as_plain_torch_does(vocab_size, scale, emulator: Emulator):
    arguments = mixed(vocab_size, scale)
    token_ids, peaks = sampling.launch_draw(emulator, *arguments)
    expected_ids, expected_peaks = sampling.draw_plainly(*arguments)
    assert torch.equal(token_ids, expected_ids)
    assert torch.equal(peaks, expected_peaks)


def by_kernel(emulator: Emulator):
    return lambda *arguments: sampling.launch_draw(emulator, *arguments)


@pytest.mark.parametrize("name", ["compiled", "plain", "kernel"])
def test_ties_are_kept_and_the_first_of_the_likeliest_is_taken(name, emulator):
    op = {"compiled": sampling.draw, "plain": sampling.draw_plainly, "kernel": by_kernel(emulator)}[name]
    logits = torch.zeros(40)
    logits[[4, 9, 30]] = 2.0
    rows = logits.expand(33, -1).contiguous()
    assert set(op(rows, wishes(33, top_k=1), evenly(33))[0].tolist()) == {4, 9, 30}
    assert set(op(rows, wishes(33, top_p=0.1), evenly(33))[0].tolist()) == {4, 9, 30}
    assert set(op(rows, wishes(33, temperature=0.0), evenly(33))[0].tolist()) == {4}


@pytest.mark.parametrize("name", ["compiled", "plain", "kernel"])
def test_rows_without_a_finite_peak_say_so_and_give_a_legal_token(name, emulator):
    op = {"compiled": sampling.draw, "plain": sampling.draw_plainly, "kernel": by_kernel(emulator)}[name]
    rows = torch.zeros(4, 50)
    rows[0, 17] = torch.nan
    rows[1] = -torch.inf
    rows[2, 3] = torch.inf
    rows[3, 8:] = -torch.inf
    for temperature in (0.0, 0.7):
        token_ids, peaks = op(rows, wishes(4, temperature, top_p=0.9), evenly(4))
        assert ((token_ids >= 0) & (token_ids < 50)).all()
        assert peaks.isfinite().tolist() == [False, False, False, True]
        assert token_ids[3] < 8


@pytest.mark.parametrize("vocab_size", [8, 61, 2500])
def test_penalties(vocab_size, emulator):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, vocab_size, generator=generator)
    divisor = 1 + torch.rand(3, vocab_size, generator=generator)
    loss = torch.rand(3, vocab_size, generator=generator)
    at = torch.tensor([4, 1]), torch.tensor([0, 2])
    expected = logits.clone()
    for i, row in zip(*at, strict=True):
        scaled = [float(x / d if x > 0 else x * d) for x, d in zip(logits[i], divisor[row], strict=True)]
        expected[i] = torch.tensor(scaled) - loss[row]
    for op in (sampling.penalise, sampling.penalise_plainly):
        op(given := logits.clone(), *at, divisor, loss)
        torch.testing.assert_close(given, expected)
    sampling.launch_penalise(emulator, given := logits.clone(), *at, divisor, loss)
    torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("vocab_size", [32, 61, 2500])
def test_forbidden_tokens(vocab_size, emulator):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, vocab_size, generator=generator)
    masks = torch.randint(-(2**31), 2**31, (2, -(-vocab_size // 32)), generator=generator).int()
    masks[1, 0] = -1
    at = torch.tensor([3, 0])
    expected = logits.clone()
    for i, row in enumerate(at.tolist()):
        for token in range(vocab_size):
            if not int(masks[i, token // 32]) >> token % 32 & 1:
                expected[row, token] = -torch.inf
    for op in (sampling.forbid, sampling.forbid_plainly):
        op(given := logits.clone(), at, masks)
        assert torch.equal(given, expected)
    sampling.launch_forbid(emulator, given := logits.clone(), at, masks)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("count", [0, 1, 5, 20, 61])
def test_the_likeliest_in_order(count):
    values = torch.randn(7, 61, generator=torch.Generator().manual_seed(0))
    values[2] = torch.arange(61)
    values[3] = -torch.arange(61.0)
    best, ids = sampling.find_likeliest(values, count)
    expected = values.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(best, expected.values[:, :count])
    assert torch.equal(ids, expected.indices[:, :count])
    assert sampling.find_likeliest(torch.zeros(1, 61), count)[1].tolist() == [list(range(count))]


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 20])
def test_a_gpu_finds_the_likeliest(count):
    values = torch.randn(7, 103424, generator=torch.Generator().manual_seed(0))
    expected = sampling.find_likeliest(values, count)
    found = sampling.find_likeliest(values.cuda(), count)
    assert torch.equal(found[0].cpu(), expected[0])
    assert torch.equal(values.gather(1, found[1].cpu()), expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [0.01, 3.0])
@pytest.mark.parametrize("vocab_size", [1, 31, 5003, 103424])
def test_a_gpu_draws_as_plain_torch_does_in_any_company(vocab_size, scale):
    logits, columns, uniform = mixed(vocab_size, scale)
    expected_ids, expected_peaks = sampling.draw_plainly(logits, columns, uniform)
    on_gpu = [logits.cuda(), sampling.Wishes(*(column.cuda() for column in columns)), uniform.cuda()]
    token_ids, peaks = sampling.draw(*on_gpu)
    assert torch.equal(token_ids.cpu(), expected_ids)
    assert torch.equal(peaks.cpu(), expected_peaks)
    for i in range(len(MIXED)):
        alone = [
            on_gpu[0][i : i + 1],
            sampling.Wishes(*(c[i : i + 1] for c in on_gpu[1])),
            on_gpu[2][i : i + 1],
        ]
        assert sampling.draw(*alone)[0] == token_ids[i]


@pytest.mark.gpu
def test_a_gpu_edits_as_plain_torch_does():
    logits, divisor, loss = torch.randn(5, 5003), 1 + torch.rand(3, 5003), torch.rand(3, 5003)
    at = torch.tensor([4, 1]), torch.tensor([0, 2])
    masks = torch.randint(-(2**31), 2**31, (2, 157)).int()
    expected, given = logits.clone(), logits.cuda()
    sampling.penalise_plainly(expected, *at, divisor, loss)
    sampling.penalise(given, *(x.cuda() for x in (*at, divisor, loss)))
    sampling.forbid_plainly(expected, at[0], masks)
    sampling.forbid(given, at[0].cuda(), masks.cuda())
    torch.testing.assert_close(given.cpu(), expected)

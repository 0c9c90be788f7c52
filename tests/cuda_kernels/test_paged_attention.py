"""Paged attention against plain softmax attention, and its bits against any other cut of the same step."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_kernels import paged_attention as op
from cuda_kernels.cache_format import gather_blocks
from cuda_kernels.paged_attention import paged_attention
from tests.cuda_kernels.attention_cases import store


class Cache:
    """A random cache whose sequences' blocks are scattered."""

    def __init__(self, context_lens, heads=(6, 2), head_dim=16, block_size=8, seed=0):
        torch.manual_seed(seed)
        self.num_heads, self.num_kv_heads = heads
        self.block_size, self.scale = block_size, head_dim**-0.5
        most = -(-max(context_lens) // block_size)
        order = torch.randperm(len(context_lens) * most + 3).int()
        self.tables = order[: len(context_lens) * most].view(len(context_lens), most)
        shape = (len(order), block_size, self.num_kv_heads, head_dim)
        self.keys, self.values = torch.randn(shape), torch.randn(shape)
        self.queries = [torch.randn(length, self.num_heads, head_dim) for length in context_lens]
        self.context_lens = context_lens
        self.scales = None

    def attend(self, parts):
        """parts: (sequence, first position, last position + 1) of each sequence in the step."""
        query = torch.cat([self.queries[s][a:b] for s, a, b in parts])
        lens = [b - a for _, a, b in parts]
        out = paged_attention(
            query,
            self.keys,
            self.values,
            self.tables[[s for s, _, _ in parts]],
            torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32),
            torch.tensor([b for _, _, b in parts], dtype=torch.int32),
            max(lens),
            self.scale,
            scales=self.scales,
        )
        return out.split(lens)

    def whole(self):
        return self.attend([(s, 0, length) for s, length in enumerate(self.context_lens)])

    def reference(self, s):
        length = self.context_lens[s]
        keys, values = (
            cache[self.tables[s].long()]
            .flatten(0, 1)[:length]
            .repeat_interleave(self.num_heads // self.num_kv_heads, 1)
            for cache in (self.keys, self.values)
        )
        scores = torch.einsum("qhc,khc->hqk", self.queries[s].double(), keys.double()) * self.scale
        scores += torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
        return torch.einsum("hqk,khc->qhc", scores.softmax(-1), values.double())


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (9, 3), (8, 8)])
@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_matches_softmax_attention(heads, block_size):
    cache = Cache([1, 7, 8, 70, 131], heads, block_size=block_size)
    for s, out in enumerate(cache.whole()):
        torch.testing.assert_close(out.double(), cache.reference(s), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.int8, 0.015), (torch.float8_e4m3fn, 0.06)]
)
def test_narrow_caches_attend_nearly_as_float32(dtype, bound, is_compiled, monkeypatch):
    """Of normal keys and values; and to what the cache holds exactly."""
    if not is_compiled:
        monkeypatch.setattr(op, "cpu", None)
    cache = Cache([1, 8, 131], (6, 2), head_dim=64)
    exact = torch.cat(cache.whole())
    (cache.keys, cache.values), cache.scales = store([cache.keys, cache.values], dtype)
    out = torch.cat(cache.whole())
    assert 0 < (out - exact).norm() / exact.norm() < bound
    held = zip((cache.keys, cache.values), cache.scales or (None, None), strict=True)
    cache.keys, cache.values = (
        gather_blocks(*kv, torch.arange(len(cache.keys))).transpose(1, 2).contiguous() for kv in held
    )
    cache.scales = None
    torch.testing.assert_close(torch.cat(cache.whole()), out, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    context_lens=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (6, 2), (9, 3)]),
    seed=st.integers(0, 2**32),
)
def test_any_chunking_in_any_company_gives_the_same_bits(context_lens, heads, seed):
    draw = random.Random(seed)
    cache = Cache(context_lens, heads)
    expected = cache.whole()
    done = [0] * len(context_lens)
    while any(d < n for d, n in zip(done, context_lens, strict=True)):
        parts = [
            (s, done[s], min(n, done[s] + draw.choice([1, 2, 63, 80])))
            for s, n in enumerate(context_lens)
            if done[s] < n and draw.random() < 0.7
        ]
        if not parts:
            continue
        for (s, a, b), out in zip(parts, cache.attend(parts), strict=True):
            assert torch.equal(out, expected[s][a:b])
            done[s] = b


def test_steps_of_many_items_are_cut_without_changing_bits(monkeypatch):
    cache = Cache([300, 200, 5])
    expected = cache.whole()
    monkeypatch.setattr(op, "_MAX_ITEMS", 7)
    for out, whole in zip(cache.whole(), expected, strict=True):
        assert torch.equal(out, whole)


def test_padding_sequences_are_left_alone():
    cache = Cache([5, 9])
    expected = cache.attend([(0, 4, 5), (1, 8, 9)])
    out = paged_attention(
        torch.cat([cache.queries[0][4:5], cache.queries[1][8:9], torch.zeros(2, 6, 16)]),
        cache.keys,
        cache.values,
        torch.cat([cache.tables, cache.tables]),
        torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32),
        torch.tensor([5, 9, 0, 0], dtype=torch.int32),
        1,
        cache.scale,
    )
    assert torch.equal(out[:2], torch.cat(expected))
    assert torch.isfinite(out).all()

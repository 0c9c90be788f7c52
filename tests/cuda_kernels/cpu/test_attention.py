"""Compiled attention against the definition, and a token's bits in any batch and chunking."""

import itertools

import pytest
import torch

from cuda_kernels.cpu import ops

QUERY_LENS, CONTEXT_LENS = [1, 40, 1, 7, 90], [200, 100, 1, 7, 230]


def definition(query, keys, values, first_position, scale):
    """[Q, H, C] float64 over the sequence's keys [K, G, C]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhc,khc->hqk", query.double(), keys) * scale
    position_Q1 = first_position + torch.arange(len(query)).unsqueeze(1)
    scores.masked_fill_(torch.arange(len(keys)) > position_Q1, -torch.inf)
    return torch.einsum("hqk,khc->qhc", scores.softmax(-1), values)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 128)])
@pytest.mark.parametrize("block_size", [16, 64])
def test_matches_the_definition_alone_and_in_company(heads, kv_heads, head_dim, block_size):
    torch.manual_seed(0)
    cache = torch.randn(2, 64, block_size, kv_heads, head_dim)
    num_blocks = [-(-length // block_size) for length in CONTEXT_LENS]
    ids = iter(torch.randperm(64).tolist())
    rows = [[next(ids) for _ in range(count)] for count in num_blocks]
    tables = torch.tensor([row + [0] * (max(num_blocks) - len(row)) for row in rows], dtype=torch.int32)
    starts = [0, *itertools.accumulate(QUERY_LENS)]
    query = torch.randn(starts[-1], heads, head_dim)
    scale = head_dim**-0.5

    def attend(part, table, cu_seqlens, lens):
        step = torch.tensor(cu_seqlens, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32)
        return ops.attention(part, cache[0], cache[1], table, *step, scale)

    whole = attend(query, tables, starts, CONTEXT_LENS)
    for s, (count, length) in enumerate(zip(QUERY_LENS, CONTEXT_LENS, strict=True)):
        mine = slice(starts[s], starts[s + 1])
        keys, values = (part[rows[s]].flatten(0, 1)[:length] for part in cache)
        expected = definition(query[mine], keys, values, length - count, scale)
        assert (whole[mine].double() - expected).abs().max() < 2e-6
        for size in (1, 7):
            ends = [min(end + size, count) for end in range(0, count, size)]
            chunks = query[mine].split(size)
            alone = [
                attend(chunk.contiguous(), tables[s : s + 1], [0, len(chunk)], [length - count + end])
                for chunk, end in zip(chunks, ends, strict=True)
            ]
            assert torch.equal(torch.cat(alone), whole[mine])

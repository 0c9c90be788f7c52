"""Steps of attention over a scattered cache, and the answer in float64."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.attention_kernels import Step

# (new tokens, all tokens) of each sequence
Lengths = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    query: Tensor  # a view of the projection, as the layer passes it
    step: Step
    max_query_len: int
    scale: float

    def to(self, device: str) -> "Case":
        moved = Step(*(getattr(self.step, name).to(device) for name in Step.__slots__))
        return Case(self.query.to(device), moved, self.max_query_len, self.scale)


def case(
    lengths: Lengths, heads: tuple[int, int], head_dim: int = 64, block_size: int = 16, seed: int = 0
) -> Case:
    """Slots past a sequence's end hold huge values, which no result may show."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    most = max(-(-total // block_size) for _, total in lengths)
    order = torch.randperm(len(lengths) * most + 2, generator=generator).int()
    tables = order[: len(lengths) * most].view(len(lengths), most)
    shape = (len(order), block_size, num_kv_heads, head_dim)
    caches = [torch.full(shape, 3e4).bfloat16() for _ in range(2)]
    for row, (_, total) in zip(tables, lengths, strict=True):
        slots = (row.long()[:, None] * block_size + torch.arange(block_size)).flatten()[:total]
        for cache in caches:
            values = torch.randn(total, num_kv_heads, head_dim, generator=generator)
            cache.flatten(0, 1)[slots] = values.bfloat16()
    starts = [0, *itertools.accumulate(new for new, _ in lengths)]
    projected = torch.randn(starts[-1], num_heads + 2 * num_kv_heads, head_dim, generator=generator)
    step = Step(
        caches[0],
        caches[1],
        tables.contiguous(),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([total for _, total in lengths], dtype=torch.int32),
    )
    query = projected.bfloat16()[:, :num_heads]
    return Case(query, step, max(new for new, _ in lengths), head_dim**-0.5)


def expected(given: Case) -> Tensor:
    """Plain softmax attention, sequence by sequence: float64 [T, H, C]."""
    step, outs = given.step, []
    group = given.query.shape[1] // step.num_kv_heads
    for s, total in enumerate(step.context_lens_S.tolist()):
        query = given.query[step.cu_seqlens_q[s] : step.cu_seqlens_q[s + 1]].double()
        keys, values = (
            cache[step.block_tables_SM[s].long()].flatten(0, 1)[:total].double().repeat_interleave(group, 1)
            for cache in (step.key_cache_BPGC, step.value_cache_BPGC)
        )
        scores = torch.einsum("qhc,khc->hqk", query, keys) * given.scale
        scores += torch.full(scores.shape[1:], -torch.inf).triu(total - len(query) + 1)
        outs.append(torch.einsum("hqk,khc->qhc", scores.softmax(-1), values))
    return torch.cat(outs)

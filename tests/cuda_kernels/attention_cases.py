"""Steps of attention over a scattered cache, and the answer in float64."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.attention_kernels import Step
from cuda_kernels.cache_format import CacheScales, gather_blocks, has_levels, quantize

# (new tokens, all tokens) of each sequence
Lengths = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    query: Tensor  # a view of the projection, as the layer passes it
    step: Step
    max_query_len: int
    scale: float

    def to(self, device: str) -> "Case":
        tensors = [getattr(self.step, name).to(device) for name in Step.__slots__[:-1]]
        scales = self.step.scales
        moved = Step(*tensors, scales and CacheScales(*(x.to(device) for x in scales)))
        return Case(self.query.to(device), moved, self.max_query_len, self.scale)


def case(
    lengths: Lengths,
    heads: tuple[int, int],
    head_dim: int = 64,
    block_size: int = 16,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    past: float = torch.nan,
) -> Case:
    """Slots past a sequence's end hold `past`, which no result may show."""
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads
    most = max(-(-total // block_size) for _, total in lengths)
    order = torch.randperm(len(lengths) * most + 2, generator=generator).int()
    tables = order[: len(lengths) * most].view(len(lengths), most)
    shape = (len(order), block_size, num_kv_heads, head_dim)
    caches = [torch.full(shape, past).bfloat16() for _ in range(2)]
    for row, (_, total) in zip(tables, lengths, strict=True):
        slots = (row.long()[:, None] * block_size + torch.arange(block_size)).flatten()[:total]
        for cache in caches:
            values = torch.randn(total, num_kv_heads, head_dim, generator=generator)
            cache.flatten(0, 1)[slots] = values.bfloat16()
    starts = [0, *itertools.accumulate(new for new, _ in lengths)]
    projected = torch.randn(starts[-1], num_heads + 2 * num_kv_heads, head_dim, generator=generator)
    stored, scales = store(caches, dtype)
    step = Step(
        *stored,
        tables.contiguous(),
        torch.tensor(starts, dtype=torch.int32),
        torch.tensor([total for _, total in lengths], dtype=torch.int32),
        scales,
    )
    query = projected.bfloat16()[:, :num_heads]
    return Case(query, step, max(new for new, _ in lengths), head_dim**-0.5)


def store(caches: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], CacheScales | None]:
    """The caches in that form."""
    if not has_levels(dtype):
        return [cache.to(dtype) for cache in caches], None
    levels, scales = zip(*(quantize(cache.flatten(0, 1), dtype) for cache in caches), strict=True)
    by_block = (x.unflatten(0, caches[0].shape[:2]).transpose(1, 2).contiguous() for x in scales)
    return [x.view_as(caches[0]) for x in levels], CacheScales(*by_block)


def expected(given: Case) -> Tensor:
    """Plain softmax attention, sequence by sequence: float64 [T, H, C]."""
    step, outs = given.step, []
    group = given.query.shape[1] // step.num_kv_heads
    for s, total in enumerate(step.context_lens_S.tolist()):
        query = given.query[step.cu_seqlens_q[s] : step.cu_seqlens_q[s + 1]].double()
        keys, values = (
            gather_blocks(*cache, step.block_tables_SM[s].long())
            .transpose(1, 2)
            .flatten(0, 1)[:total]
            .double()
            .repeat_interleave(group, 1)
            for cache in step.caches
        )
        scores = torch.einsum("qhc,khc->hqk", query, keys) * given.scale
        scores += torch.full(scores.shape[1:], -torch.inf).triu(total - len(query) + 1)
        outs.append(torch.einsum("hqk,khc->qhc", scores.softmax(-1), values))
    return torch.cat(outs)

"""Paged attention at ERNIE 4.5's shapes: decodes, and prompts beside torch's.

python -m tests.bench.bench_attention [--shape 300b 21b] [--output FILE.json]
"""

from __future__ import annotations

import torch

from cuda_kernels.attention_kernels import Step, launch_attention
from cuda_kernels.launch import cuda_device
from tests.bench.gpu_timing import Timer, arguments, describe_device
from tests.bench.results import save

HEADS = {"300b": (64, 8), "21b": (20, 4)}  # of queries, and of keys and values
HEAD_DIM, BLOCK_SIZE = 128, 64
SCALE = HEAD_DIM**-0.5
DECODES = (
    (1, 128),
    (1, 2048),
    (1, 8192),
    (1, 65536),
    (8, 2048),
    (64, 2048),
    (128, 1024),
)  # sequences, context
PROMPTS = (512, 2048, 8192)


def step(num_kv_heads: int, num_sequences: int, context_len: int, query_len: int) -> Step:
    """Sequences of one length, their blocks scattered."""
    blocks = context_len // BLOCK_SIZE
    shape = (num_sequences * blocks, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
    keys, values = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    tables = torch.randperm(num_sequences * blocks, device="cuda").int().view(num_sequences, blocks)
    starts = torch.arange(0, num_sequences * query_len + 1, query_len, device="cuda").int()
    return Step(keys, values, tables, starts, torch.full((num_sequences,), context_len, device="cuda").int())


def decode(timer: Timer, shape: str, num_sequences: int, context_len: int) -> None:
    (num_heads, num_kv_heads), device = HEADS[shape], cuda_device(0)
    of = step(num_kv_heads, num_sequences, context_len, 1)
    query = torch.randn(num_sequences, num_heads, HEAD_DIM, device="cuda").bfloat16()
    timer.compare(
        f"{shape} decode, {num_sequences} sequences of {context_len}",
        lambda: launch_attention(device, query, of, 1, SCALE),
        num_bytes=2 * of.key_cache_BPGC.nbytes,
    )


def prefill(timer: Timer, shape: str, length: int) -> None:
    (num_heads, num_kv_heads), device = HEADS[shape], cuda_device(0)
    of = step(num_kv_heads, 1, length, length)
    query = torch.randn(length, num_heads, HEAD_DIM, device="cuda").bfloat16()
    q, k, v = (
        x.flatten(0, -3).transpose(0, 1)[None] for x in (query, of.key_cache_BPGC, of.value_cache_BPGC)
    )
    timer.compare(
        f"{shape} prompt of {length}",
        lambda: launch_attention(device, query, of, length, SCALE),
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        num_operations=2 * length**2 * num_heads * HEAD_DIM,
    )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    timer = Timer()
    print(describe_device(timer))
    for shape in args.shape:
        for num_sequences, context_len in DECODES:
            decode(timer, shape, num_sequences, context_len)
        for length in PROMPTS:
            prefill(timer, shape, length)
    save(args.output, timer.figures())


if __name__ == "__main__":
    main()

"""Paged attention of ERNIE 4.5 300B (64 query heads, 8 KV heads of 128): decodes, and prompts.

python -m tests.bench.bench_attention
"""

from __future__ import annotations

import torch

from cuda_kernels.attention_kernels import Step, launch_attention
from cuda_kernels.launch import cuda_device
from tests.bench.gpu_timing import Timer, describe_device

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 64, 8, 128, 64
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


def step(num_sequences: int, context_len: int, query_len: int) -> Step:
    """Sequences of one length, their blocks scattered."""
    blocks = context_len // BLOCK_SIZE
    shape = (num_sequences * blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    keys, values = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    tables = torch.randperm(num_sequences * blocks, device="cuda").int().view(num_sequences, blocks)
    starts = torch.arange(0, num_sequences * query_len + 1, query_len, device="cuda").int()
    return Step(keys, values, tables, starts, torch.full((num_sequences,), context_len, device="cuda").int())


def decode(timer: Timer, num_sequences: int, context_len: int) -> None:
    of, device = step(num_sequences, context_len, 1), cuda_device(0)
    query = torch.randn(num_sequences, NUM_HEADS, HEAD_DIM, device="cuda").bfloat16()
    name = f"decode, {num_sequences} sequences of {context_len}"
    num_bytes = 2 * of.key_cache_BPGC.nbytes
    print(timer.line(name, lambda: launch_attention(device, query, of, 1, SCALE), num_bytes), flush=True)


def prefill(timer: Timer, length: int) -> None:
    of, device = step(1, length, length), cuda_device(0)
    query = torch.randn(length, NUM_HEADS, HEAD_DIM, device="cuda").bfloat16()
    us = timer.microseconds(lambda: launch_attention(device, query, of, length, SCALE))
    q, k, v = (
        x.flatten(0, -3).transpose(0, 1)[None] for x in (query, of.key_cache_BPGC, of.value_cache_BPGC)
    )
    torch_us = timer.microseconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )
    operations = 2 * length**2 * NUM_HEADS * HEAD_DIM
    print(
        f"prompt of {length}: {us:9.1f} us {operations / us * 1e-6:6.1f} TFLOP/s, torch {torch_us:9.1f} us",
        flush=True,
    )


def main() -> None:
    timer = Timer()
    print(describe_device(timer))
    for num_sequences, context_len in DECODES:
        decode(timer, num_sequences, context_len)
    for length in PROMPTS:
        prefill(timer, length)


if __name__ == "__main__":
    main()

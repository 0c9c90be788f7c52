"""Norm, rope, KV store and routing at ERNIE 4.5 300B's widths, beside the same in torch.

python -m tests.bench.bench_small_ops
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cuda_kernels import kv_store, norm, rope, routing
from tests.bench.gpu_timing import Timer, describe_device

HIDDEN, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_EXPERTS, ACTIVATED = 8192, 64, 8, 128, 64, 8
ROWS = (1, 64, 4096)
Work = Callable[[], object]


def cases(rows: int) -> dict[str, tuple[float, Work, Work]]:
    """Bytes moved, the op, and torch's form of it."""
    x, scale = (
        torch.randn(rows, HIDDEN, device="cuda").bfloat16(),
        torch.ones(HIDDEN, device="cuda").bfloat16(),
    )
    heads = torch.randn(rows, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
    query, key, value = heads.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    table, positions = rope.cos_sin_table(8192, HEAD_DIM, 5e5).cuda(), torch.arange(rows, device="cuda")
    cache = torch.zeros(2, rows // 64 + 1, 64, NUM_KV_HEADS, HEAD_DIM, device="cuda").bfloat16()
    logits, bias = torch.randn(rows, NUM_EXPERTS, device="cuda"), torch.zeros(NUM_EXPERTS, device="cuda")

    def torch_norm() -> None:
        torch.nn.functional.rms_norm(x + x, (HIDDEN,), scale, 1e-5)

    def torch_rope() -> None:
        cos, sin = table[positions].unsqueeze(1).chunk(2, dim=-1)
        for part in (query, key):
            even, odd = part.float().unflatten(-1, (-1, 2)).unbind(-1)
            torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2).bfloat16()

    def torch_store() -> None:
        cache[0].flatten(0, 1).index_copy_(0, positions, key)
        cache[1].flatten(0, 1).index_copy_(0, positions, value)

    def torch_route() -> None:
        probabilities = logits.softmax(-1)
        ids = torch.topk(probabilities + bias, ACTIVATED).indices
        chosen = probabilities.gather(-1, ids)
        chosen / chosen.sum(-1, keepdim=True)

    kv_bytes = 4 * key.numel() * 2
    return {
        "add_rms_norm": (8 * x.numel(), lambda: norm.add_rms_norm(x, x, scale, 1e-5), torch_norm),
        "rope": (
            4 * (query.numel() + key.numel()),
            lambda: rope.rope(query, key, positions, table),
            torch_rope,
        ),
        "kv_store": (
            kv_bytes,
            lambda: kv_store.kv_store(key, value, cache[0], cache[1], positions),
            torch_store,
        ),
        "route": (4 * logits.numel(), lambda: routing.route(logits, bias, ACTIVATED, 1e-12), torch_route),
    }


def main() -> None:
    timer = Timer()
    print(describe_device(timer))
    for rows in ROWS:
        for name, (num_bytes, work, torch_work) in cases(rows).items():
            print(
                timer.line(f"{name}, {rows} rows", work, num_bytes, timer.microseconds(torch_work)),
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Norm, rope, KV store and routing at ERNIE 4.5's widths, beside the same in torch.

"router" is the router's matrix product with the choice, beside the library's product and `route`.

python -m tests.bench.bench_small_ops [--shape 300b 21b] [--output FILE.json]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cuda_kernels import kv_store, norm, rope, routing
from cuda_kernels.linear import pack_dense
from tests.bench.gpu_timing import ROWS, Timer, arguments, describe_device
from tests.bench.results import save

HEAD_DIM, NUM_EXPERTS = 128, 64
Work = Callable[[], object]


@dataclass(frozen=True)
class Widths:
    """Of one model."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    activated: int


WIDTHS = {"300b": Widths(8192, 64, 8, 8), "21b": Widths(2560, 20, 4, 6)}


def cases(of: Widths, rows: int) -> dict[str, tuple[float, Work, Work]]:
    """Bytes moved, the op, and torch's form of it."""
    x, scale = (
        torch.randn(rows, of.hidden, device="cuda").bfloat16(),
        torch.ones(of.hidden, device="cuda").bfloat16(),
    )
    heads = torch.randn(rows, of.num_heads + 2 * of.num_kv_heads, HEAD_DIM, device="cuda").bfloat16()
    query, key, value = heads.split([of.num_heads, of.num_kv_heads, of.num_kv_heads], dim=1)
    table, positions = rope.cos_sin_table(8192, HEAD_DIM, 5e5).cuda(), torch.arange(rows, device="cuda")
    cache = torch.zeros(2, rows // 64 + 1, 64, of.num_kv_heads, HEAD_DIM, device="cuda").bfloat16()
    logits, bias = torch.randn(rows, NUM_EXPERTS, device="cuda"), torch.zeros(NUM_EXPERTS, device="cuda")
    router = pack_dense(torch.randn(NUM_EXPERTS, of.hidden, device="cuda") / of.hidden)

    def torch_norm() -> None:
        torch.nn.functional.rms_norm(x + x, (of.hidden,), scale, 1e-5)

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
        ids = torch.topk(probabilities + bias, of.activated).indices
        chosen = probabilities.gather(-1, ids)
        chosen / chosen.sum(-1, keepdim=True)

    def library_router() -> None:
        routing.route(torch.nn.functional.linear(x.float(), router.data), bias, of.activated, 1e-12)

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
        "route": (4 * logits.numel(), lambda: routing.route(logits, bias, of.activated, 1e-12), torch_route),
        "router": (
            router.nbytes + 2 * x.numel(),
            lambda: routing.choose_experts(x, router, bias, of.activated, 1e-12),
            library_router,
        ),
    }


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    timer = Timer()
    print(describe_device(timer))
    for shape in args.shape:
        for rows in ROWS:
            for name, (num_bytes, work, rival) in cases(WIDTHS[shape], rows).items():
                timer.compare(f"{shape} {name}, {rows} rows", work, rival, num_bytes=num_bytes)
    save(args.output, timer.figures())


if __name__ == "__main__":
    main()

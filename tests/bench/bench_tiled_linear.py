"""WINT4, WINT8 and bfloat weights streamed for few rows, and their experts, at ERNIE 4.5's shapes.

python -m tests.bench.bench_tiled_linear [--shape 300b 21b] [--output FILE.json]
"""

from __future__ import annotations

import torch

from cuda_kernels.tiled import Bits, TiledWeight
from cuda_kernels.tiled_linear import moe_tiled, tiled_linear
from tests.bench.gpu_timing import ROWS, Timer, arguments, describe_device
from tests.bench.results import save

# of each model, a layer's projections: outputs, inputs
DENSE = {
    "300b": {
        "qkv": (10240, 8192),
        "o": (8192, 8192),
        "up and gate": (57344, 8192),
        "down": (8192, 28672),
    },
    "21b": {"qkv": (3584, 2560), "o": (2560, 2560)},
}
EXPERTS = {"300b": (64, 8, 8192, 3584), "21b": (64, 6, 2560, 1536)}  # E, A, D, F


def weight(
    num_outputs: int, num_inputs: int, bits: Bits, experts: int = 1, is_gated: bool = False
) -> TiledWeight:
    """Random bytes in the kernel's layout."""
    shape = (experts, num_outputs // 32, num_inputs * bits // 256, 2, 32, 16)
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    if bits == 16:
        tiles = torch.randn(*shape[:-1], 8, device="cuda").bfloat16().view(torch.uint8)
    scales = None if bits == 16 else torch.rand(*shape[:2], 2, 16, device="cuda") * 1e-4
    return TiledWeight(tiles, scales, bits, num_inputs, num_outputs, is_gated)


def dense(timer: Timer, shape: str, name: str, bits: Bits) -> None:
    num_outputs, num_inputs = DENSE[shape][name]
    packed = weight(num_outputs, num_inputs, bits)
    plain = torch.randn(num_outputs, num_inputs, device="cuda").bfloat16()
    for rows in ROWS:
        x = torch.randn(rows, num_inputs, device="cuda").bfloat16()
        timer.compare(
            f"{shape} {name}, {bits} bits, {rows} rows",
            lambda x=x: tiled_linear(x, packed),
            lambda x=x: torch.nn.functional.linear(x, plain),
            num_bytes=packed.nbytes,
        )


def experts(timer: Timer, shape: str, bits: Bits) -> None:
    count, activated, hidden, inner = EXPERTS[shape]
    up_gate = weight(2 * inner, hidden, bits, count, is_gated=True)
    down = weight(hidden, inner, bits, count)
    for rows in ROWS:
        x = torch.randn(rows, hidden, device="cuda").bfloat16()
        ids = torch.rand(rows, count, device="cuda").argsort(1)[:, :activated].int().contiguous()
        weights = torch.rand(rows, activated, device="cuda")
        timer.compare(
            f"{shape} experts, {bits} bits, {rows} tokens",
            lambda x=x, ids=ids, weights=weights: moe_tiled(x, ids, weights, up_gate, down),
            num_bytes=ids.unique().numel() / count * (up_gate.nbytes + down.nbytes),
        )


def main() -> None:
    args = arguments(__doc__.splitlines()[0])
    timer = Timer()
    print(describe_device(timer))
    all_bits: tuple[Bits, ...] = (4, 8, 16)
    for shape in args.shape:
        for bits in all_bits:
            for name in DENSE[shape]:
                dense(timer, shape, name, bits)
        for bits in all_bits[:2]:
            experts(timer, shape, bits)
    save(args.output, timer.figures())


if __name__ == "__main__":
    main()

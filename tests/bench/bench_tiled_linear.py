"""WINT4, WINT8 and bfloat weights streamed for few rows, and their experts, at ERNIE 4.5's shapes.

python -m tests.bench.bench_tiled_linear
"""

from __future__ import annotations

import torch

from cuda_kernels.tiled import Bits, TiledWeight
from cuda_kernels.tiled_linear import moe_tiled, tiled_linear
from tests.bench.gpu_timing import Timer, describe_device

# name: outputs, inputs
DENSE = {
    "300B qkv": (10240, 8192),
    "300B o": (8192, 8192),
    "300B up and gate": (57344, 8192),
    "300B down": (8192, 28672),
    "21B qkv": (3584, 2560),
    "21B o": (2560, 2560),
}
ROWS = (1, 8, 16, 32, 64, 128, 512, 4096)
NUM_EXPERTS, ACTIVATED, HIDDEN, INNER = 64, 8, 8192, 3584


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


def dense(timer: Timer, name: str, bits: Bits) -> None:
    num_outputs, num_inputs = DENSE[name]
    packed = weight(num_outputs, num_inputs, bits)
    plain = torch.randn(num_outputs, num_inputs, device="cuda").bfloat16()
    for rows in ROWS:
        x = torch.randn(rows, num_inputs, device="cuda").bfloat16()
        torch_us = timer.microseconds(lambda x=x: torch.nn.functional.linear(x, plain))
        print(
            timer.line(
                f"{name}, {bits} bits, {rows} rows",
                lambda x=x: tiled_linear(x, packed),
                packed.nbytes,
                torch_us,
            ),
            flush=True,
        )


def experts(timer: Timer, bits: Bits) -> None:
    up_gate = weight(2 * INNER, HIDDEN, bits, NUM_EXPERTS, is_gated=True)
    down = weight(HIDDEN, INNER, bits, NUM_EXPERTS)
    for rows in ROWS:
        x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
        ids = torch.rand(rows, NUM_EXPERTS, device="cuda").argsort(1)[:, :ACTIVATED].int().contiguous()
        weights = torch.rand(rows, ACTIVATED, device="cuda")
        used = ids.unique().numel() / NUM_EXPERTS * (up_gate.nbytes + down.nbytes)
        print(
            timer.line(
                f"300B experts, {bits} bits, {rows} tokens",
                lambda x=x, ids=ids, weights=weights: moe_tiled(x, ids, weights, up_gate, down),
                used,
            ),
            flush=True,
        )


def main() -> None:
    timer = Timer()
    print(describe_device(timer))
    all_bits: tuple[Bits, ...] = (4, 8, 16)
    for bits in all_bits:
        for name in DENSE:
            dense(timer, name, bits)
    for bits in all_bits[:2]:
        experts(timer, bits)


if __name__ == "__main__":
    main()

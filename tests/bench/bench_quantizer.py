"""Speed and error of the encoders on Gaussian weights: python -m tests.bench.bench_quantizer"""

import argparse
import time

import torch

from cuda_kernels.formats import wint2, wint2t
from tests.bench.gptq_baseline import round_to_nearest

LITERATURE = (
    ("Lloyd-Max, 2 bits", 0.1175),
    ("E8P lattice, 2 bits (QuIP#)", 0.0917),
    ("trellis L=16, 2 bits (QTIP)", 0.0688),
    ("rate-distortion bound, 2 bits", 0.0625),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[3584, 8192])
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--efforts", nargs="*", default=["fast", "normal", "best"])
    parser.add_argument("--trellis", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    print(
        f"{'':<32}{'MSE':>8}{'Mweights/s':>12}{'s/Mweight':>12}   {device}, {torch.get_num_threads()} threads"
    )
    for name, error in LITERATURE:
        print(f"{name:<32}{error:>8.4f}")
    for rows in args.rows:
        weight = torch.randn(rows, args.columns, generator=torch.Generator().manual_seed(0)).to(device)
        report(f"2-bit scalar g64, K={rows}", weight, round_to_nearest)
        for effort in args.efforts:
            report(f"WINT2 {effort}, K={rows}", weight, lambda w, e=effort: encode(wint2, w, e))
        if args.trellis:
            few = weight[:, : 8 if device.type == "cpu" else None]
            report(f"WINT2T fast, K={rows}", few, lambda w: encode(wint2t, w, "fast"))


def encode(module, weight, effort):
    return module.dequantize(*module.quantize(weight, effort=effort).tensors().values()).float()


def report(name, weight, method) -> None:
    method(weight[:128, :8])  # compiles
    start = time.perf_counter()
    decoded = method(weight)
    seconds = time.perf_counter() - start
    error = float((weight - decoded).square().mean() / weight.square().mean())
    speed = weight.numel() / seconds / 1e6
    print(f"{name:<32}{error:>8.4f}{speed:>12.2f}{1 / speed:>12.3f}", flush=True)


if __name__ == "__main__":
    main()

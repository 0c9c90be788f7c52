"""Finds the pairs of cuda_kernels/formats/codebooks.py: python -m tests.bench.search_codebooks

Random pairs on the 1/128 grid and walks around the best of them are measured on Gaussian vectors under a few
scales. Near copies are dropped; what is left is ordered greedily: each pair is the one that, mirrored or not,
promises most beside those before it, on independent channels.
"""

import argparse
import time

import torch

from cuda_kernels.formats import ccq, search
from cuda_kernels.formats.scales import Fitter, Metric

GRID = 128
LARGEST_CODE = 0x7FFF
SCALES = (0.0565, 0.0585, 0.0605, 0.0625)
NUM_VECTORS = 8192
POOL, COPIES = 400, 0.75  # candidates kept; two that share this part of their points are copies
CHANNELS, ROWS = 192, 3584

Pair = tuple[float, float]


def one_scale_error(pair: Pair, vectors: torch.Tensor) -> float:
    """Mean squared error of [4, V] unit Gaussians under the best of SCALES."""
    targets = torch.cat([vectors / scale for scale in SCALES], dim=1).unsqueeze(0)
    score = search.nearest(targets, ccq.codebook(*pair)).score.view(len(SCALES), -1)
    gain = 2 * torch.tensor(SCALES).square().unsqueeze(1) * score
    return float((gain.mean(dim=1) + vectors.square().sum(dim=0).mean()).min() / 4)


def draw(best: list[tuple[float, Pair]], generator: torch.Generator) -> Pair:
    """A pair near one of the best, or anywhere."""
    integer = lambda low, high: int(torch.randint(low, high, (1,), generator=generator))  # noqa: E731
    if len(best) > 20 and integer(0, 2):
        scale, zp = best[integer(0, min(60, len(best)))][1]
        return scale + integer(-2, 3) / GRID, abs(zp + integer(-400, 401) / GRID)
    return integer(100 * GRID, 125 * GRID) / GRID, integer(0, 2000 * GRID) / GRID


def search_pairs(seconds: float) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, NUM_VECTORS, generator=generator)
    found: dict[Pair, float] = {}
    best: list[tuple[float, Pair]] = []
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        pair = draw(best, generator)
        if pair not in found and 255 * pair[0] + pair[1] + 1 <= LARGEST_CODE:
            found[pair] = one_scale_error(pair, vectors)
            best = sorted([*best, (found[pair], pair)])[:2000]
    return [pair for _, pair in best]


def without_copies(pairs: list[Pair]) -> list[Pair]:
    kept: list[tuple[Pair, torch.Tensor]] = []
    for pair in pairs:
        points = ccq.code_points(*(torch.tensor([value]) for value in pair))
        if all((points == other).float().mean() < COPIES for _, other in kept):
            kept.append((pair, points))
    return [pair for pair, _ in kept[:POOL]]


def greedy(pairs: list[Pair], count: int) -> None:
    weight = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(1))
    fitter = Fitter(weight, Metric.plain(weight.device))
    books = [ccq.codebook(*pair) for pair in pairs]
    errors = torch.stack([torch.minimum(fitter.promise(b), fitter.promise(-b)) for b in books]) / ROWS
    least = torch.full((CHANNELS,), torch.inf)
    for number in range(1, count + 1):
        index = int(torch.minimum(errors, least).mean(dim=1).argmin())
        least = torch.minimum(errors[index], least)
        print(f"    {pairs[index]},  # best of {number}: {least.mean():.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--count", type=int, default=64)
    args = parser.parse_args()
    greedy(without_copies(search_pairs(args.seconds)), args.count)


if __name__ == "__main__":
    main()

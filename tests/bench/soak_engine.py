"""Plays thousands of random schedules on the engine and compares every completion with the naive engine's.

Every second one with overlap.

python -m tests.bench.soak_engine [--num-schedules 5000] [--first-seed 0]
"""

from __future__ import annotations

import argparse
import time

import torch

from tests.gpu_worker.test_differential import play_schedule


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-schedules", type=int, default=5000)
    parser.add_argument("--first-seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    seeds = range(args.first_seed, args.first_seed + args.num_schedules)
    compared = sum(play_schedule(seed, overlap=seed % 2 == 1) for seed in seeds)
    print(
        f"{args.num_schedules} schedules, {compared} completions equal to the naive engine's, "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()

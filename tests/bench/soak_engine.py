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
    compared = 0
    for played in range(1, args.num_schedules + 1):
        seed = args.first_seed + played - 1
        compared += play_schedule(seed, overlap=seed % 2 == 1)
        if played % 500 == 0 or played == args.num_schedules:
            print(
                f"{played} schedules, {compared} completions equal to the naive engine's, "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()

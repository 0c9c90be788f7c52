"""Times GPU work as a served step runs it: from a CUDA graph, with a cold L2 cache."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1024, 4096)
_FLUSHED_BYTES = 2**29  # ten times an H100's L2


class Timer:
    """The median of some runs in microseconds, less an empty graph's; `rows` holds what was compared."""

    def __init__(self, repetitions: int = 20) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("no GPU: nothing to time")
        self.rows: list[dict[str, Any]] = []
        self._repetitions = repetitions
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
        byte = self._flushed[:1]
        self._overhead = 0.0
        self._overhead = self.microseconds(lambda: byte.zero_())
        self.copy_bytes_a_second = self._copy_rate()

    def microseconds(self, work: Callable[[], object]) -> float:
        work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        times = [self._timed(graph.replay) for _ in range(self._repetitions)]
        return max(0.1, statistics.median(times) - self._overhead)

    def _timed(self, work: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.fill_(1)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3

    def _copy_rate(self) -> float:
        """Bytes read and written in a second by a large copy; in a graph a slower engine would make it."""
        source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
        times = [self._timed(lambda: target.copy_(source)) for _ in range(self._repetitions)]
        return 2 * source.numel() / (statistics.median(times) * 1e-6)

    def compare(
        self,
        name: str,
        work: Callable[[], object],
        rival: Callable[[], object] | None = None,
        *,
        num_bytes: float | None = None,
        num_operations: float | None = None,
    ) -> None:
        """Times the op and torch's way; prints the rate of the bytes or operations that it takes."""
        row: dict[str, Any] = {"name": name, "microseconds": self.microseconds(work)}
        text = f"{name:44s} {row['microseconds']:9.1f} us"
        if num_bytes is not None:
            row["bytes_per_second"] = rate = num_bytes / row["microseconds"] * 1e6
            text += f" {rate * 1e-12:6.2f} TB/s {rate / self.copy_bytes_a_second:5.0%}"
        if num_operations is not None:
            row["flops"] = num_operations / row["microseconds"] * 1e6
            text += f" {row['flops'] * 1e-12:6.1f} TFLOP/s"
        if rival is not None:
            row["torch_microseconds"] = self.microseconds(rival)
            ratio = row["torch_microseconds"] / row["microseconds"]
            text += f"   torch {row['torch_microseconds']:9.1f} us, {ratio:5.2f} times ours"
        self.rows.append(row)
        print(text, flush=True)

    def figures(self) -> dict[str, Any]:
        """For `results.save`."""
        return {"copy_bytes_per_second": self.copy_bytes_a_second, "rows": self.rows}


def describe_device(timer: Timer) -> str:
    rate = timer.copy_bytes_a_second * 1e-12
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {rate:.2f} TB/s"


def arguments(description: str) -> argparse.Namespace:
    """The command line of a benchmark of one op."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--shape", nargs="+", choices=("300b", "21b"), default=["300b", "21b"])
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args()

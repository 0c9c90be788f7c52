"""Times GPU work as a served step runs it: from a CUDA graph, with a cold L2 cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

_FLUSHED_BYTES = 2**29  # ten times an H100's L2


class Timer:
    """The median of some runs in microseconds, less what an empty graph takes."""

    def __init__(self, repetitions: int = 20) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("no GPU: nothing to time")
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
        return max(0.1, statistics.median(map(self._once, [graph] * self._repetitions)) - self._overhead)

    def _once(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flushed.fill_(1)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3

    def _copy_rate(self) -> float:
        """Bytes read and written in a second by a large copy."""
        source, target = (torch.empty(2**30, dtype=torch.uint8, device="cuda") for _ in range(2))
        return 2 * source.numel() / (self.microseconds(lambda: target.copy_(source)) * 1e-6)

    def line(
        self, name: str, work: Callable[[], object], num_bytes: float, torch_us: float | None = None
    ) -> str:
        """One row of a table: time, bytes a second, their share of the copy rate, torch's time."""
        us = self.microseconds(work)
        rate = num_bytes / us * 1e6
        row = f"{name:44s} {us:9.1f} us {rate * 1e-12:6.2f} TB/s {rate / self.copy_bytes_a_second:5.0%}"
        return (
            row if torch_us is None else f"{row}   torch {torch_us:9.1f} us, {torch_us / us:5.2f} times ours"
        )


def describe_device(timer: Timer) -> str:
    rate = timer.copy_bytes_a_second * 1e-12
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copies {rate:.2f} TB/s"

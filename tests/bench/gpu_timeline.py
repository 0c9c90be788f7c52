"""What a GPU does in a step by torch's profiler: which kernels run, and when none does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Kernels of a graph follow each other within some microseconds; a longer gap waits for the host.
_LONG_GAP_SECONDS = 12e-6

Span = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Seconds of one step, under the profiler, which itself makes it longer."""

    total: float
    busy: float
    short_gaps: float
    long_gaps: float
    kernels: Counter[str]
    events: list[tuple[str, float, float]]  # name, start, end of all kernels of one step, from its first on

    def share_without_kernel(self, clock_seconds: float) -> float:
        """Of a step that takes so long without the profiler."""
        return max(0.0, 1 - self.busy / clock_seconds)

    def lines(self, clock_seconds: float) -> list[str]:
        """A table; `clock_seconds` is what the step takes without the profiler."""
        parts = [
            ("step by the clock, without the profiler", clock_seconds),
            ("step under the profiler", self.total),
            ("with a kernel", self.busy),
            ("between kernels of one graph", self.short_gaps),
            ("waiting for the host", self.long_gaps),
        ]
        rows = [f"{seconds * 1e3:9.3f} ms  {what}" for what, seconds in parts]
        rows.append(
            f"{self.share_without_kernel(clock_seconds):9.1%}     of the step by the clock has no kernel"
        )
        return rows + [
            f"{seconds * 1e3:9.3f} ms  {name[:80]}" for name, seconds in self.kernels.most_common(14)
        ]

    def figures(self, clock_seconds: float) -> dict[str, Any]:
        """For `results.save`: times in microseconds, kernels by their number among `names`."""
        names = list(self.kernels)
        return {
            "clock_seconds": clock_seconds,
            "busy_seconds": self.busy,
            "gap_seconds": self.short_gaps,
            "host_seconds": self.long_gaps,
            "share_without_kernel": self.share_without_kernel(clock_seconds),
            "kernel_seconds": {name[:80]: seconds for name, seconds in self.kernels.most_common()},
            "names": [name[:80] for name in names],
            "events": [
                [names.index(name), round(start * 1e6, 2), round(end * 1e6, 2)]
                for name, start, end in self.events
            ],
        }


def gaps(spans: list[Span]) -> list[float]:
    """Seconds in which no span lies, in their order; spans may overlap."""
    found, reached = [], None
    for start, end in sorted(spans):
        if reached is not None and start > reached:
            found.append(start - reached)
        reached = end if reached is None else max(reached, end)
    return found


def record(step: Callable[[], object], num_steps: int) -> Timeline:
    """The mean of some steps, and the kernels of the one in their middle."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
        total = time.perf_counter() - start
    events = sorted(
        (event.time_range.start * 1e-6, event.time_range.end * 1e-6, event.name)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    kernels: Counter[str] = Counter()
    for begin, end, name in events:
        kernels[name] += (end - begin) / num_steps
    spans = [(begin, end) for begin, end, _ in events]
    between = gaps(spans)
    whole = max(end for _, end in spans) - spans[0][0]
    long = sum(gap for gap in between if gap > _LONG_GAP_SECONDS)
    short = sum(between) - long
    middle = events[len(events) * (num_steps // 2) // num_steps :][: len(events) // num_steps]
    return Timeline(
        total / num_steps,
        (whole - long - short) / num_steps,
        short / num_steps,
        long / num_steps,
        kernels,
        [(name, begin - middle[0][0], end - middle[0][0]) for begin, end, name in middle],
    )

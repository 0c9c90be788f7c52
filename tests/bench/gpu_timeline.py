"""What a GPU does in a step by torch's profiler: which kernels run, and when none does."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

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
            f"{max(0.0, 1 - self.busy / clock_seconds):9.1%}     of the step by the clock has no kernel"
        )
        return rows + [
            f"{seconds * 1e3:9.3f} ms  {name[:80]}" for name, seconds in self.kernels.most_common(14)
        ]


def gaps(spans: list[Span]) -> list[float]:
    """Seconds in which no span lies, in their order; spans may overlap."""
    found, reached = [], None
    for start, end in sorted(spans):
        if reached is not None and start > reached:
            found.append(start - reached)
        reached = end if reached is None else max(reached, end)
    return found


def record(step: Callable[[], object], num_steps: int) -> Timeline:
    """The mean of some steps."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
        total = time.perf_counter() - start
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels: Counter[str] = Counter()
    for event in events:
        kernels[event.name] += (event.time_range.end - event.time_range.start) * 1e-6 / num_steps
    spans = [(event.time_range.start * 1e-6, event.time_range.end * 1e-6) for event in events]
    between = gaps(spans)
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    long = sum(gap for gap in between if gap > _LONG_GAP_SECONDS)
    short = sum(between) - long
    return Timeline(
        total / num_steps, (whole - long - short) / num_steps, short / num_steps, long / num_steps, kernels
    )

"""Where a completion's time went, as spans of its request."""

from __future__ import annotations

import time

from gpu_worker.engine.sequence import Timings
from protos.rpc.tracing import tracer


def record_phases(spent: Timings) -> None:
    """Three spans that follow one another and end now, children of the current one."""
    end = time.time_ns()
    for name, seconds in (
        ("decode", spent.decode_seconds),
        ("prefill", spent.prefill_seconds),
        ("queue", spent.queue_seconds),
    ):
        start = end - int(seconds * 1e9)
        tracer.start_span(name, start_time=start).end(end)
        end = start

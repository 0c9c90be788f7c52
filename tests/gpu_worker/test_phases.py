"""Phases, by a clock of the test's own."""

from __future__ import annotations

from gpu_worker.engine.phases import Phases


def test_each_phase_lasts_from_the_end_of_the_one_before():
    times = iter([10.0, 12.5, 12.6])
    phases = Phases(lambda: next(times))
    phases.end("weights")
    phases.end("kernels")
    assert str(phases) == "weights 2.5 s, kernels 0.1 s"

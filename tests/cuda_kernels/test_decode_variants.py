"""The arithmetics of bench_decode_variants on the host emulator: right, and as cheap as it says."""

from pathlib import Path

import pytest

from tests.bench.bench_decode_variants import ARMS, emulate

BY_NAME = {arm.name: arm for arm in ARMS}


@pytest.mark.parametrize(
    ("name", "budget", "tolerance"),
    [("half, short codes", 1.6, 1e-5), ("int8, 8 rows, short codes", 1.55, 1e-4)],
)
def test_arithmetic(name: str, budget: float, tolerance: float, emulator_folder: Path) -> None:
    figures = emulate(BY_NAME[name], emulator_folder)
    assert figures.instructions_per_weight <= budget
    assert figures.error < tolerance

"""What compute-sanitizer is to watch: every kernel there is."""

import re
from pathlib import Path

import pytest

from cuda_kernels.build import SOURCES
from tests.cuda_kernels.sanitize import Verdict, run, write_copies
from tests.cuda_kernels.small_cases import Watched, cases

_KERNEL = re.compile(r"^KERNEL\(.*?\)\s+(\w+)\(", re.MULTILINE)


def test_every_kernel_is_among_them() -> None:
    device = Watched(None)
    for case in cases():
        case.launch(device, "cpu")
    there_are = {name for path in SOURCES.glob("*.cu") for name in _KERNEL.findall(path.read_text())}
    assert {kernel for _, kernel in device.launched} == there_are


@pytest.mark.gpu
def test_every_kernel_is_right_on_a_gpu() -> None:
    run(cases())


def test_copies_for_racecheck_differ_in_who_arrives(tmp_path: Path) -> None:
    copies = write_copies(tmp_path)
    changed = [path for path in SOURCES.iterdir() if path.read_text() != (copies / path.name).read_text()]
    assert {path.name for path in changed} >= {"expert_batch.cu", "moe_wint2.cu"}
    assert all("arrive_at(" in path.read_text() or "count_call(" in path.read_text() for path in changed)


def verdict(log: str, code: int = 0) -> Verdict:
    return Verdict("racecheck", 9.2, code, "60 cases right\n", log)


def test_a_verdict_says_what_was_expected_and_found() -> None:
    clean = verdict("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n")
    assert clean.is_clean
    assert clean.lines() == ["racecheck: expected 0, found 0; 60 cases right; 9 s"]
    hazard = "========= Error: Potential WAR hazard detected\n" * 2
    found = verdict(hazard + "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", 9)
    assert not found.is_clean
    assert found.lines()[0].startswith("racecheck: expected 0, found 2;")
    assert found.lines()[1] == "  2 x Error: Potential WAR hazard detected"
    assert not verdict("").is_clean
    assert verdict("").lines()[0].startswith("racecheck: no summary")

"""What compute-sanitizer is to watch: every kernel there is."""

import re
from pathlib import Path

from cuda_kernels.build import SOURCES
from tests.cuda_kernels.sanitize import write_copies
from tests.cuda_kernels.small_cases import Watched, cases

_KERNEL = re.compile(r"^KERNEL\(.*?\)\s+(\w+)\(", re.MULTILINE)


def test_every_kernel_is_among_them() -> None:
    device = Watched(None)
    for case in cases():
        case.launch(device, "cpu")
    there_are = {name for path in SOURCES.glob("*.cu") for name in _KERNEL.findall(path.read_text())}
    assert {kernel for _, kernel in device.launched} == there_are


def test_copies_for_racecheck_differ_in_who_arrives(tmp_path: Path) -> None:
    copies = write_copies(tmp_path)
    changed = [path for path in SOURCES.iterdir() if path.read_text() != (copies / path.name).read_text()]
    assert changed
    assert all("arrive_at(" in path.read_text() for path in changed)

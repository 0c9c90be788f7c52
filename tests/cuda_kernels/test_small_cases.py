"""What compute-sanitizer is to watch: every kernel there is."""

import re

from cuda_kernels.build import SOURCES
from tests.cuda_kernels.small_cases import Watched, cases

_KERNEL = re.compile(r"^KERNEL\(.*?\)\s+(\w+)\(", re.MULTILINE)


def test_every_kernel_is_among_them() -> None:
    device = Watched(None)
    for case in cases():
        case.launch(device, "cpu")
    there_are = {name for path in SOURCES.glob("*.cu") for name in _KERNEL.findall(path.read_text())}
    assert {kernel for _, kernel in device.launched} == there_are

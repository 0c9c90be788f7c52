"""What the driver's launch call is handed: arguments of eight bytes, the grid, the overlap attribute."""

import ctypes
from typing import Any

import pytest
import torch

from cuda_kernels import driver


class FakeLibrary:
    """Reads what it is given while the caller's buffers live."""

    def __init__(self, result: int = 0) -> None:
        self.result = result

    def cuLaunchKernelEx(self, config: Any, function: Any, pointers: Any, extra: None) -> int:
        self.config = config._obj
        self.function = function.value
        self.words = [ctypes.string_at(address, 8) for address in pointers]
        return self.result

    def cuGetErrorName(self, code: int, text: Any) -> None:
        text._obj.value = b"CUDA_ERROR_INVALID_VALUE"


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setattr(driver, "_library", lambda: fake)
    return fake


def test_arguments_and_shape(library: FakeLibrary) -> None:
    tensor = torch.zeros(4)
    driver.launch(77, (3, 2), 256, 1024, 5, [tensor, None, -7, 2.5])
    assert [int.from_bytes(word, "little") for word in library.words[:2]] == [tensor.data_ptr(), 0]
    assert ctypes.c_int32.from_buffer_copy(library.words[2]).value == -7
    assert ctypes.c_float.from_buffer_copy(library.words[3]).value == 2.5
    config = library.config
    assert (library.function, *config.grid, *config.block) == (77, 3, 2, 1, 256, 1, 1)
    assert (config.shared_bytes, config.stream, config.num_attributes) == (1024, 5, 0)


def test_an_overlapping_launch_says_so(library: FakeLibrary) -> None:
    driver.launch(1, (1, 1), 32, 0, 0, [1], overlaps=True)
    attribute = library.config.attributes[0]
    assert (library.config.num_attributes, attribute.id, attribute.value) == (1, 6, 1)
    assert ctypes.sizeof(attribute) == 72  # CUlaunchAttribute's


def test_a_refused_launch_is_named(library: FakeLibrary) -> None:
    library.result = 1
    with pytest.raises(RuntimeError, match=r"CUDA driver: CUDA_ERROR_INVALID_VALUE \(1\)"):
        driver.launch(1, (1, 1), 32, 0, 0, [])

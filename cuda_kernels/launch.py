"""Launches built kernels on torch's current stream, also into a CUDA graph, and checks what ops are given."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cuda_kernels.build import Variant, device_arch, load_or_build

Argument = Tensor | int | float | None
Grid = tuple[int, int]


class Device(Protocol):
    """Where kernels run: a GPU, or the tests' host emulator."""

    num_multiprocessors: int
    shared_bytes: int  # the most one CTA may have

    def launch(
        self,
        variant: Variant,
        kernel: str,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        """Starts one kernel; tensors go as pointers, ints as int32, floats as float32, None as null."""


class CudaDevice:
    """One GPU, through CuPy."""

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.num_multiprocessors: int = properties.multi_processor_count
        self.shared_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        self._index = index
        self._arch = device_arch((properties.major, properties.minor))
        self._kernels: dict[tuple[Variant, str], Any] = {}

    def launch(
        self,
        variant: Variant,
        kernel: str,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
    ) -> None:
        import cupy

        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(self._index).cuda_stream, self._index)
        packed = tuple(_cuda_argument(argument) for argument in arguments)
        with cupy.cuda.Device(self._index), stream:
            function = self._kernel(variant, kernel)
            if shared_bytes > function.max_dynamic_shared_size_bytes:
                function.max_dynamic_shared_size_bytes = shared_bytes
            function((*grid, 1), (threads, 1, 1), packed, shared_mem=shared_bytes)

    def _kernel(self, variant: Variant, kernel: str) -> Any:
        if (variant, kernel) not in self._kernels:
            import cupy

            module = cupy.RawModule(path=str(load_or_build(variant, self._arch)))
            self._kernels[variant, kernel] = module.get_function(kernel)
        return self._kernels[variant, kernel]


@cache
def cuda_device(index: int) -> CudaDevice:
    """The GPU of that number; kernels are loaded once a process."""
    return CudaDevice(index)


def check(name: str, tensor: Tensor, shape: Sequence[int | None], dtypes: Sequence[torch.dtype]) -> None:
    """Raises ValueError unless `tensor` is contiguous, of a listed dtype and shape (None: any size)."""
    fits = len(shape) == tensor.ndim and all(w in (None, n) for w, n in zip(shape, tensor.shape, strict=True))
    if not (fits and tensor.dtype in dtypes and tensor.is_contiguous()):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        layout = "" if tensor.is_contiguous() else ", not contiguous"
        raise ValueError(
            f"{name}: expected contiguous {kinds} [{wanted}], got {tensor.dtype} {list(tensor.shape)}{layout}"
        )


def _cuda_argument(argument: Argument) -> Any:
    match argument:
        case Tensor():
            return argument.data_ptr()
        case None:
            return 0
        case float():
            return np.float32(argument)
        case int():
            return np.int32(argument)

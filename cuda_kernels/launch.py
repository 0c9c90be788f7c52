"""Launches built kernels on torch's current stream, also into a CUDA graph, and checks what ops are given."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from cuda_kernels import driver
from cuda_kernels.build import Variant, device_arch, load_or_build

_SHARED_BYTES_ALLOWED = 48 * 1024  # of every kernel without asking

Argument = Tensor | int | float | None
Grid = tuple[int, int]


class Device(Protocol):
    """Where kernels run: a GPU, or the tests' host emulator."""

    num_multiprocessors: int
    shared_bytes: int  # the most one CTA may have
    has_warpgroup_products: bool  # wgmma, which Hopper alone has

    def launch(
        self,
        variant: Variant,
        kernel: str,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        *,
        overlaps: bool = False,
    ) -> None:
        """Starts one kernel; tensors go as pointers, ints as int32, floats as float32, None as null.

        One that `overlaps` may start before the kernel before it has ended, and waits for it by itself.
        """


class _Loaded:
    """A kernel, the most shared memory it was allowed so far, and the module that must live as long."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.pointer: int = function.kernel.ptr
        self.shared_bytes = _SHARED_BYTES_ALLOWED


class CudaDevice:
    """One GPU, through CuPy."""

    def __init__(self, index: int) -> None:
        properties = torch.cuda.get_device_properties(index)
        self.num_multiprocessors: int = properties.multi_processor_count
        self.shared_bytes: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
        self.has_warpgroup_products: bool = properties.major == 9
        self._index = index
        self._can_overlap = properties.major >= 9
        self._arch = device_arch((properties.major, properties.minor))
        self._kernels: dict[tuple[Variant, str], _Loaded] = {}

    def launch(
        self,
        variant: Variant,
        kernel: str,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        *,
        overlaps: bool = False,
    ) -> None:
        function = self._function(variant, kernel, shared_bytes)
        stream = torch.cuda.current_stream(self._index).cuda_stream
        overlaps = overlaps and self._can_overlap
        driver.launch(function, grid, threads, shared_bytes, stream, arguments, overlaps=overlaps)

    def _function(self, variant: Variant, kernel: str, shared_bytes: int) -> int:
        """The CUfunction, loaded on first use, allowed that much shared memory."""
        loaded = self._kernels.get((variant, kernel))
        if loaded is None:
            loaded = self._kernels[variant, kernel] = _Loaded(self._load(variant, kernel))
        if shared_bytes > loaded.shared_bytes:
            driver.allow_shared_bytes(loaded.pointer, shared_bytes)
            loaded.shared_bytes = shared_bytes
        return loaded.pointer

    def _load(self, variant: Variant, kernel: str) -> Any:
        import cupy

        with cupy.cuda.Device(self._index):
            module = cupy.RawModule(path=str(load_or_build(variant, self._arch)))
            return module.get_function(kernel)


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

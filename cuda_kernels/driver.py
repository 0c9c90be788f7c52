"""The CUDA driver's launch call by ctypes: a few microseconds of host time, where CuPy's own takes tens.

A step outside of a graph launches hundreds of kernels: their host time is the time to a prompt's first token.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from torch import Tensor

_OVERLAP_ATTRIBUTE = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_MAX_SHARED_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class _LaunchAttribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    )


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


_OVERLAPS = _LaunchAttribute(_OVERLAP_ATTRIBUTE, 0, 1)


def launch(
    function: int,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    stream: int,
    arguments: Sequence[Tensor | int | float | None],
    *,
    overlaps: bool = False,
) -> None:
    """Starts a CUfunction: tensors and None go as pointers, ints as int32, floats as float32.

    One that `overlaps` may start before the kernel before it has ended, and waits for it by itself.
    """
    kinds = "".join(map(_kind, arguments))
    values = [
        argument.data_ptr() if isinstance(argument, Tensor) else argument or 0 for argument in arguments
    ]
    block = ctypes.create_string_buffer(_packer(kinds).pack(*values))
    base = ctypes.addressof(block)
    pointers = (ctypes.c_void_p * len(values))(*range(base, base + 8 * len(values), 8))
    config = _LaunchConfig((*grid, 1), (threads, 1, 1), shared_bytes, stream)
    if overlaps:
        config.attributes, config.num_attributes = ctypes.pointer(_OVERLAPS), 1
    _expect_success(
        _library().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
    )


def allow_shared_bytes(function: int, shared_bytes: int) -> None:
    """Lets a CUfunction have that much dynamic shared memory."""
    library = _library()
    _expect_success(
        library.cuFuncSetAttribute(ctypes.c_void_p(function), _MAX_SHARED_ATTRIBUTE, shared_bytes)
    )


def _kind(argument: object) -> str:
    """An argument in eight bytes, in `struct`'s notation."""
    return "q" if type(argument) is int else "f4x" if type(argument) is float else "Q"


@lru_cache(maxsize=256)
def _packer(kinds: str) -> struct.Struct:
    return struct.Struct("<" + kinds)


@cache
def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _expect_success(code: int) -> None:
    if code != 0:
        text = ctypes.c_char_p()
        _library().cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver: {(text.value or b'unknown error').decode()} ({code})")

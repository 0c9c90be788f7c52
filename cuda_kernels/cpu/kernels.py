"""The panel kernels as compiled functions with an address, one a format, compiled when first asked for.

A driver (linear layer, experts, attention) is given the address, so that it is compiled once for all formats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc

from cuda_kernels.cpu import dots, tiles
from cuda_kernels.cpu import vector as v
from cuda_kernels.cpu.caching import callback
from cuda_kernels.cpu.panels import KernelName
from cuda_kernels.cpu.vector import I64, LANES, Builder, Value

Kernel = Callable[[int, int, int, int, int, int, int], None]

_SIGNATURE = types.void(*[types.int64] * 7)

_float32 = tiles.panel_product(tiles.decode_float32)
_narrow = tiles.panel_product(tiles.decode_narrow, LANES)
_bfloat16 = tiles.panel_product(tiles.decode_bfloat16)
_wint8 = tiles.panel_product(tiles.decode_wint8)
_wint4 = tiles.panel_product(tiles.decode_wint4)
_wint2 = tiles.panel_product(tiles.decode_wint2)
_scattered = tiles.panel_product(tiles.decode_scattered)
_wint8_dot = dots.panel_dot(dots.find_wint8, zero=128, is_decoded=False)
_wint4_dot = dots.panel_dot(dots.find_wint4, zero=8)
_wint2_dot = dots.panel_dot(dots.find_wint2, zero=32)


# Plain functions, one a kernel: Numba finds compiled code again by a function's module, name and line.
def _multiply_float32(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _float32(x, y, n, panel, scale, k, adds)


def _multiply_narrow(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _narrow(x, y, n, panel, scale, k, adds)


def _multiply_bfloat16(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _bfloat16(x, y, n, panel, scale, k, adds)


def _multiply_wint8(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _wint8(x, y, n, panel, scale, k, adds)


def _multiply_wint4(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _wint4(x, y, n, panel, scale, k, adds)


def _multiply_wint2(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _wint2(x, y, n, panel, scale, k, adds)


def _multiply_scattered(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _scattered(x, y, n, panel, scale, k, adds)


def _dot_wint8(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _wint8_dot(x, y, n, panel, scale, k, adds)


def _dot_wint4(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _wint4_dot(x, y, n, panel, scale, k, adds)


def _dot_wint2(x: int, y: int, n: int, panel: int, scale: int, k: int, adds: int) -> None:
    _wint2_dot(x, y, n, panel, scale, k, adds)


_KERNELS: dict[KernelName, Kernel] = {
    "float32": _multiply_float32,
    "narrow": _multiply_narrow,
    "bfloat16": _multiply_bfloat16,
    "wint8": _multiply_wint8,
    "wint4": _multiply_wint4,
    "wint2": _multiply_wint2,
    "scattered": _multiply_scattered,
    "wint8_dot": _dot_wint8,
    "wint4_dot": _dot_wint4,
    "wint2_dot": _dot_wint2,
}


@cache
def _compiled(name: KernelName) -> CFunc:
    return callback(_SIGNATURE, _KERNELS[name])


@cache
def address_of(name: KernelName) -> int:
    """Where the format's kernel is, for `multiply`."""
    address = _compiled(name).address
    assert address is not None
    return address


def _call(builder: Builder, address: Value, *arguments: Value) -> None:
    kind = ir.FunctionType(ir.VoidType(), [I64] * len(arguments))
    builder.call(builder.inttoptr(address, kind.as_pointer()), arguments)


# In compiled code: the kernel at an address, and what it takes (tiles.panel_product).
multiply = v.kernel(_call, 8)

"""Vectors in compiled CPU code: LLVM's own vector types, which every CPU's back end maps to what it has.

Numba compiles loops well but decides by itself what becomes a vector and what stays in registers. The kernels
here say it: 16 float32 lanes, accumulators that never leave their registers, one fused multiply-add after
another in a fixed order. The same code runs on AVX-512, AVX2 and NEON, with the same bits.

Kernels take addresses (int64), so that a call from Python costs no array boxing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from inspect import Parameter, Signature
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
I8, I16, I32, I64, F32 = (*map(ir.IntType, (8, 16, 32, 64)), ir.FloatType())

Builder = Any
Value = Any


def vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


VF32, VI32 = vector(F32), vector(I32)


def constant(number: float) -> Value:
    """The number in every float32 lane."""
    return ir.Constant(VF32, [ir.Constant(F32, number)] * LANES)


def integer(number: int) -> Value:
    """The number in every int32 lane."""
    return ir.Constant(VI32, [ir.Constant(I32, number)] * LANES)


def offset(builder: Builder, address: Value, num_bytes: Value | int) -> Value:
    if isinstance(num_bytes, int):
        num_bytes = ir.Constant(I64, num_bytes)
    return builder.add(address, num_bytes)


def scaled(builder: Builder, index: Value, size: int) -> Value:
    return builder.mul(index, ir.Constant(I64, size))


def load(builder: Builder, address: Value, what: Any = VF32) -> Value:
    """A scalar or a vector from an address that need not be aligned to more than an element."""
    value = builder.load(builder.inttoptr(address, what.as_pointer()), typ=what)
    value.align = _element_bytes(what)
    return value


def store(builder: Builder, value: Value, address: Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=_element_bytes(value.type))


def _element_bytes(what: Any) -> int:
    element = what.element if isinstance(what, ir.VectorType) else what
    return 4 if element == F32 else int(element.width) // 8


def splat(builder: Builder, scalar: Value) -> Value:
    """The scalar in every lane."""
    whole = ir.VectorType(scalar.type, LANES)
    first = builder.insert_element(ir.Constant(whole, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, ir.Constant(whole, ir.Undefined), integer(0))


def shuffle(builder: Builder, lanes: Value, order: list[int], more: Value | None = None) -> Value:
    """The lanes in this order; numbers past the last lane pick from `more`."""
    mask = ir.Constant(VI32, [ir.Constant(I32, lane) for lane in order])
    return builder.shuffle_vector(
        lanes, ir.Constant(lanes.type, ir.Undefined) if more is None else more, mask
    )


@contextmanager
def vectors(builder: Builder, width: Value) -> Iterator[Value]:
    """A loop over a row of `width` floats, a vector at a time: the byte offset of each."""
    with cgutils.for_range(builder, builder.sdiv(width, ir.Constant(I64, LANES))) as loop:
        yield scaled(builder, loop.index, 4 * LANES)


def call(builder: Builder, name: str, *operands: Value) -> Value:
    """An LLVM intrinsic on float32 vectors: fma, floor, maxnum, ..."""
    kind = ir.FunctionType(VF32, [VF32] * len(operands))
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{LANES}f32")
    return builder.call(function, operands)


def fma(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    """a·b + c, rounded once."""
    return call(builder, "fma", a, b, c)


def fold(builder: Builder, lanes: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """All lanes combined, halves with halves, in every lane."""
    for distance in (8, 4, 2, 1):
        lanes = combine(lanes, shuffle(builder, lanes, [lane ^ distance for lane in range(LANES)]))
    return lanes


@cache
def _cpu_features() -> dict[str, bool]:
    return dict(get_host_cpu_features())


def has_features(*names: str) -> bool:
    """Whether this CPU has them, by LLVM's names."""
    return all(_cpu_features().get(name, False) for name in names)


def has_dot4() -> bool:
    """Whether this CPU has what `dot4` and `floor` take."""
    return has_features("avx512f", "avx512vnni")


def dot4(builder: Builder, sums: Value, weights: Value, x: Value) -> Value:
    """Each int32 lane plus Σ weight · x over its four bytes: unsigned weights, signed x."""
    kind = ir.FunctionType(VI32, [VI32] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(function, (sums, weights, x))


def prefetch(builder: Builder, address: Value) -> None:
    """Has the cache line there fetched; it may be anywhere."""
    pointer_type = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer_type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    read, keep_close, data = (ir.Constant(I32, number) for number in (0, 3, 1))
    builder.call(function, (builder.inttoptr(address, pointer_type), read, keep_close, data))


def floor(builder: Builder, x: Value) -> Value:
    """The floor as int32, in one instruction of AVX-512."""
    kind = ir.FunctionType(VI32, [VF32, VI32, I16, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.cvtps2dq.512")
    towards_minus_infinity = ir.Constant(I32, 9)
    return builder.call(function, (x, integer(0), ir.Constant(I16, -1), towards_minus_infinity))


def multishift(builder: Builder, lanes: Value, shifts: tuple[int, int, int, int]) -> Value:
    """The eight bits from each of four places of an int32 lane, as its bytes (AVX-512 VBMI)."""
    eight_bytes = [*shifts, *(32 + shift for shift in shifts)]
    bytes_64 = ir.VectorType(I8, 64)
    control = ir.Constant(bytes_64, [ir.Constant(I8, shift) for shift in eight_bytes * 8])
    kind = ir.FunctionType(bytes_64, [bytes_64] * 2)
    name = "llvm.x86.avx512.pmultishift.qb.512"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.bitcast(builder.call(function, (control, builder.bitcast(lanes, bytes_64))), VI32)


def _to_pointer(context: Any, address: Any) -> tuple[Any, Any]:
    def codegen(context: Any, builder: Builder, _: Any, arguments: tuple[Value, ...]) -> Value:
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.int64), codegen


def _keep(context: Any, array: Any) -> tuple[Any, Any]:
    return types.void(array), lambda context, *_: context.get_dummy_value()


# In compiled code: holds an array until here. Numba frees it after its last use, and an address is none.
keep: Any = intrinsic(_keep)


# In compiled code: an address as numba.carray takes it.
pointer: Any = intrinsic(_to_pointer)


def kernel(emit: Callable[..., None], num_arguments: int) -> Any:
    """A Numba intrinsic of int64 arguments without a result: emit(builder, *arguments) writes its code."""
    return _wrap(emit, num_arguments, types.void)


def function(emit: Callable[..., Value], num_arguments: int) -> Any:
    """A Numba intrinsic of int64 arguments that returns an int64."""
    return _wrap(emit, num_arguments, types.int64)


def _wrap(emit: Callable[..., Any], num_arguments: int, returns: Any) -> Any:
    signature = returns(*[types.int64] * num_arguments)

    def codegen(context: Any, builder: Builder, _: Any, arguments: tuple[Value, ...]) -> Value:
        result = emit(builder, *arguments)
        return context.get_dummy_value() if returns is types.void else result

    def typer(_: Any, *arguments: Any) -> tuple[Any, Any]:
        return signature, codegen

    # Numba reads the number of arguments off the signature.
    names = ["context", *(f"argument_{i}" for i in range(num_arguments))]
    parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    typer.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    return intrinsic(typer)

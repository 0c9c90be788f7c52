"""Where the ops find their compiled CPU half: `cpu` is None without Numba, and plain torch computes."""

from __future__ import annotations

import torch

try:
    from cuda_kernels.cpu import ops, vector, warm_up
except ImportError:
    ops = vector = warm_up = None  # type: ignore[assignment]

cpu = ops


def has_compiled(x: torch.Tensor) -> bool:
    """Whether the compiled row operations take this tensor: on a CPU, float32, rows of whole vectors."""
    return cpu is not None and cpu.fits(x)


def compile_kernels() -> float:
    """Compile all of it that is not in Numba's cache; the seconds it took."""
    return warm_up.compile_kernels()


def has_integer_kernels() -> bool:
    """Whether this CPU can multiply with activations of int8."""
    return vector is not None and vector.has_dot4()

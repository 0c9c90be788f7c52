"""The C library's heap: what a load has freed is given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache


def trim_heap() -> None:
    """Give back what is free. glibc keeps it otherwise: weights decoded and dropped between others that stay
    leave holes, which alignment makes too small for the next ones; in the end as much as the model's size.
    """
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    """None where the C library has none, or holds none back."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)

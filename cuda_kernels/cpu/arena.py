"""Memory for weights in pages of 2 MiB, where the system grants them.

A token reads every weight once, and with small pages nearly every 4 KiB of it cost a walk of the page tables.
Weights lie in the order in which they come, which is that in which a step reads them: what is fetched past
the end of one is the beginning of the next.
"""

from __future__ import annotations

import math
import mmap
import threading
from functools import cache

import torch

_HUGE_PAGE = 1 << 21
_CHUNK = 1 << 25
_LINE = 64


class Arena:
    """Deals out memory from chunks; a chunk is given back when nothing of it is in use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int) -> torch.Tensor:
        """Bytes of no particular value, at the beginning of a cache line."""
        num_bytes = math.prod(shape)
        size = -(-num_bytes // _LINE) * _LINE
        with self._lock:
            if size > len(self._rest):
                self._rest = _chunk(max(size, _CHUNK))
            taken, self._rest = self._rest[:num_bytes], self._rest[size:]
        return taken.view(shape)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same values in memory of the arena."""
        target = self.empty(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return target.copy_(tensor)


def _chunk(num_bytes: int) -> torch.Tensor:
    """Bytes from the system, from the beginning of a huge page on."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    chunk = torch.frombuffer(memory, dtype=torch.uint8)
    start = -chunk.data_ptr() % _HUGE_PAGE
    return chunk[start : start + num_bytes]


@cache
def weight_arena() -> Arena:
    return Arena()

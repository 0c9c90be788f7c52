"""torch's CUDA caching allocator, told of a CPU's tensors: what would be in use, and what would be stuck.

As c10/cuda/CUDACachingAllocator.cpp has it, without streams and with all sizes divided by `scale`: a tensor
takes the smallest free piece that holds it, in a segment of small ones or of large ones; what is left of the
piece stays free; only whole segments are given back.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


@dataclass(eq=False)
class Piece:
    """Of a segment, which is a list of its pieces in their order."""

    size: int
    is_small: bool
    segment: list[Piece]
    is_free: bool = True


class Pool:
    """Segments, cut into pieces."""

    def __init__(self, scale: int) -> None:
        self._mib = MIB // scale
        self._unit = max(1, 512 // scale)
        self._free: list[Piece] = []  # the smallest first
        self.reserved = 0

    def take(self, num_bytes: int) -> Piece:
        size = -(-num_bytes // self._unit) * self._unit
        is_small = size <= self._mib
        piece = next((p for p in self._free if p.is_small == is_small and p.size >= size), None)
        if piece is None:
            piece = self._segment(size, is_small)
        else:
            self._free.remove(piece)
        rest = piece.size - size
        if rest >= self._unit if is_small else rest > self._mib:
            self._cut(piece, rest)
        piece.is_free = False
        return piece

    def give(self, piece: Piece) -> None:
        piece.is_free = True
        segment, at = piece.segment, piece.segment.index(piece)
        for neighbour in (*segment[at + 1 : at + 2], *segment[max(0, at - 1) : at]):
            if neighbour.is_free:
                self._free.remove(neighbour)
                segment.remove(neighbour)
                piece.size += neighbour.size
        insort(self._free, piece, key=lambda p: p.size)

    def empty(self) -> None:
        """Gives back the segments that are free as a whole."""
        self.reserved -= sum(p.size for p in self._free if len(p.segment) == 1)
        self._free = [p for p in self._free if len(p.segment) > 1]

    def _segment(self, size: int, is_small: bool) -> Piece:
        whole = -(-size // (2 * self._mib)) * 2 * self._mib
        if not is_small and size < 10 * self._mib:
            whole = 20 * self._mib
        self.reserved += whole
        piece = Piece(whole, is_small, [])
        piece.segment.append(piece)
        return piece

    def _cut(self, piece: Piece, size: int) -> None:
        rest = Piece(size, piece.is_small, piece.segment)
        piece.size -= size
        piece.segment.insert(piece.segment.index(piece) + 1, rest)
        insort(self._free, rest, key=lambda p: p.size)


class DeviceMemory(TorchDispatchMode):
    """Gives every new tensor a place, in the pool that is in use, until its storage ends."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self._scale = scale
        self.main = self._current = Pool(scale)
        self.scratch: list[Pool] = []
        self._live: dict[int, tuple[StorageWeakRef, Pool, Piece]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else the first call imports all of torch's compiler."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.settle()
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._place(tensor.untyped_storage())
        return result

    def settle(self) -> None:
        """Takes back what has ended."""
        for key, (storage, pool, piece) in list(self._live.items()):
            if storage.expired():
                del self._live[key]
                pool.give(piece)

    def make_pool(self) -> Pool:
        self.scratch.append(Pool(self._scale))
        return self.scratch[-1]

    @contextmanager
    def use_pool(self, pool: Pool) -> Iterator[None]:
        self._current = pool
        yield
        self._current = self.main

    def empty_cache(self) -> None:
        self.settle()
        self.main.empty()

    def _place(self, storage: torch.UntypedStorage) -> None:
        if storage.nbytes() and storage._cdata not in self._live:
            pool = self._current
            self._live[storage._cdata] = StorageWeakRef(storage), pool, pool.take(storage.nbytes())

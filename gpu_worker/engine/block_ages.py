"""How long blocks of the KV cache keep their contents, and how long these are not asked for."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

AGE_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(slots=True)
class Ages:
    """A distribution of seconds: counts[i] of them in (AGE_BUCKETS[i - 1], AGE_BUCKETS[i]]."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(AGE_BUCKETS) + 1))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(AGE_BUCKETS, seconds)] += 1
        self.seconds += seconds


class BlockAges:
    """Told by the block manager what becomes of each block."""

    def __init__(self, num_blocks: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._written = [0.0] * num_blocks
        self._left = [0.0] * num_blocks
        self.lifetime = Ages()  # from its allocation until its content is evicted
        self.idle_before_evict = Ages()
        self.reuse_gap = Ages()  # from the last reference given back to the next one taken

    def write(self, block: int) -> None:
        """It is allocated, for new content."""
        self._written[block] = self._clock()

    def leave(self, block: int) -> None:
        """Nobody refers to it any more."""
        self._left[block] = self._clock()

    def reuse(self, block: int) -> None:
        """Its content is wanted again, after nobody had referred to it."""
        self.reuse_gap.add(self._clock() - self._left[block])

    def evict(self, block: int) -> None:
        """Its content gives way."""
        now = self._clock()
        self.lifetime.add(now - self._written[block])
        self.idle_before_evict.add(now - self._left[block])

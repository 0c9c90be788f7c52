"""Who holds which block of the KV cache, and which blocks' contents are worth keeping for a later prompt.

A block is in one of three states:

    used    ref_count >= 1   in the block table of that many running sequences
    cached  ref_count == 0   free, but its content still answers to a hash; the least recently used goes first
    empty   ref_count == 0   free, nothing worth keeping; goes before any cached one
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from gpu_worker.engine.block_ages import BlockAges


def hash_block(parent: bytes, token_ids: NDArray[np.int32]) -> bytes:
    """Names the content of a full block: its own tokens and, through `parent`, all that come before it.

    Who shares a block can tell by the timing, so the chain starts from the request's cache salt.
    """
    return blake2b(token_ids.tobytes(), digest_size=16, key=parent).digest()


class BlockManager:
    """Counts the references to each block and finds blocks by the hash of their content."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self.ages = BlockAges(num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest known prefix of a hash chain; takes no reference."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def num_available(self, shared: Sequence[int]) -> int:
        """Free blocks left once `shared` are taken."""
        return len(self._free) - sum(1 for block in shared if not self._ref_counts[block])

    def share(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each block."""
        for block in blocks:
            if not self._ref_counts[block]:
                del self._free[block]
                self.ages.reuse(block)
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes `count` free blocks, which must exist, and forgets what they held."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            if block in self._hash_of:
                self.ages.evict(block)
                self._forget(block)
            self.ages.write(block)
            self._ref_counts[block] = 1
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each block of a table; a prompt's tail is evicted before its head."""
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} freed twice"
            self._ref_counts[block] -= 1
            if not self._ref_counts[block]:
                self.ages.leave(block)
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, digest: bytes) -> None:
        """Makes a full block findable; when an equal one is known already, that one stays."""
        if block not in self._hash_of and digest not in self._block_of:
            self._hash_of[block] = digest
            self._block_of[digest] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Makes blocks that only one table holds unfindable: their content is not to be trusted."""
        for block in self.own(blocks):
            self._forget(block)

    def own(self, blocks: Iterable[int]) -> list[int]:
        """Those that only one table holds."""
        return [block for block in blocks if self._ref_counts[block] == 1]

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Asserts that the references counted are those of the block tables, and that the indexes agree."""
        held = Counter(block for table in tables for block in table)
        counted = {block: count for block, count in enumerate(self._ref_counts) if count}
        assert counted == held, f"references counted {counted}, in tables {dict(held)}"
        assert self._free.keys() == set(range(self.num_blocks)) - held.keys()
        assert {digest: block for block, digest in self._hash_of.items()} == self._block_of

    def _forget(self, block: int) -> None:
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

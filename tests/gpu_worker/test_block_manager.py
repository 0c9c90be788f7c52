"""BlockManager: reference counts equal the tables, whatever is allocated, shared, freed and evicted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gpu_worker.engine.block_manager import BlockManager, hash_block

ROOT = b"root"


def chain(*words: str) -> list[bytes]:
    """Hashes of blocks whose contents are the words, one after another."""
    hashes = [ROOT]
    for word in words:
        hashes.append(hash_block(hashes[-1], np.frombuffer(word.encode(), np.int8).astype(np.int32)))
    return hashes[1:]


class Blocks(RuleBasedStateMachine):
    """Tables of full blocks; each block's content is one of two words, so that prefixes often coincide."""

    @initialize(num_blocks=st.integers(1, 8))
    def start(self, num_blocks: int) -> None:
        self.manager = BlockManager(num_blocks, block_size=4)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # what each block holds, as the last writer left it

    @rule(words=st.lists(st.sampled_from("ab"), min_size=1, max_size=4), registers=st.booleans())
    def take(self, words: list[str], registers: bool) -> None:
        """What an admission does: share the known prefix, allocate the rest, fill it."""
        hashes = chain(*words)
        shared = self.manager.lookup(hashes)
        assert [self.contents[block] for block in shared] == hashes[: len(shared)]
        missing = len(words) - len(shared)
        if missing > self.manager.num_available(shared):
            return
        self.manager.share(shared)
        fresh = self.manager.allocate(missing)
        assert not set(fresh) & {block for table in [*self.tables, shared] for block in table}
        self.tables.append(shared + fresh)
        for block, digest in zip(fresh, hashes[len(shared) :], strict=True):
            self.contents[block] = digest
            if registers:
                self.manager.register(block, digest)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.manager.release(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.manager.forget(data.draw(st.sampled_from(self.tables)))

    @invariant()
    def counts_equal_tables(self) -> None:
        if hasattr(self, "manager"):
            self.manager.check_integrity(self.tables)
            assert self.manager.num_used == len({block for table in self.tables for block in table})
            assert self.manager.num_used + self.manager.num_free == self.manager.num_blocks


Blocks.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestBlocks = Blocks.TestCase


def filled(manager: BlockManager, hashes: list[bytes]) -> list[int]:
    blocks = manager.allocate(len(hashes))
    for block, digest in zip(blocks, hashes, strict=True):
        manager.register(block, digest)
    return blocks


def test_the_least_recently_used_prefix_goes_first_and_its_tail_before_its_head():
    manager = BlockManager(4, block_size=4)
    old, new = chain("x", "y"), chain("p", "q")
    old_blocks, new_blocks = filled(manager, old), filled(manager, new)
    manager.release(old_blocks)
    manager.release(new_blocks)
    manager.share(manager.lookup(old))  # now the older one is the more recently used
    manager.release(old_blocks)
    manager.allocate(1)
    assert manager.lookup(old) == old_blocks
    assert manager.lookup(new) == new_blocks[:1]


def test_empty_blocks_are_taken_before_cached_ones():
    manager = BlockManager(3, block_size=4)
    cached = filled(manager, chain("x"))
    empty = manager.allocate(2)
    manager.release(cached)
    manager.release(empty)
    manager.allocate(2)
    assert manager.lookup(chain("x")) == cached


def test_equal_blocks_after_unequal_ones_have_unequal_hashes():
    assert chain("x", "z")[1] != chain("y", "z")[1]


def test_misuse_is_caught():
    manager = BlockManager(2, block_size=4)
    blocks = manager.allocate(2)
    with pytest.raises(AssertionError, match="1 blocks wanted, 0 free"):
        manager.allocate(1)
    manager.release(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.release(blocks[:1])
    with pytest.raises(AssertionError, match="references counted"):
        manager.check_integrity([blocks])

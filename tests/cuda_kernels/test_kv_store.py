"""Keys and values land in their slots and nowhere else."""

import pytest
import torch

from cuda_kernels.cache_format import CacheScales, gather_blocks
from cuda_kernels.kv_store import kv_store, launch_store_levels


def caches(dtype=torch.float32):
    return torch.full((4, 3, 2, 5), -7.0, dtype=dtype), torch.full((4, 3, 2, 5), -9.0, dtype=dtype)


def test_stores_at_block_and_offset_and_leaves_the_rest():
    keys, values = caches()
    key, value = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    kv_store(key, value, keys, values, torch.tensor([11, 0, 4]))
    for row, (block, offset) in enumerate([(3, 2), (0, 0), (1, 1)]):
        assert torch.equal(keys[block, offset], key[row])
        assert torch.equal(values[block, offset], value[row])
    assert (keys == -7).sum() == (4 * 3 - 3) * 10


def test_padding_tokens_are_skipped():
    keys, values = caches()
    kv_store(torch.ones(3, 2, 5), torch.ones(3, 2, 5), keys, values, torch.tensor([-1, 5, -1]))
    assert (keys == 1).sum() == (values == 1).sum() == 10
    assert (keys[1, 2] == 1).all()


def test_stores_in_the_dtype_of_the_cache():
    keys, values = caches(torch.bfloat16)
    key = torch.randn(1, 2, 5)
    kv_store(key, key, keys, values, torch.tensor([2]))
    assert torch.equal(keys[0, 2], key[0].bfloat16())


def test_takes_views_of_a_fused_projection():
    keys, values = caches()
    fused = torch.randn(2, 6, 5)
    kv_store(fused[:, 2:4], fused[:, 4:], keys, values, torch.tensor([1, 2]))
    assert torch.equal(keys[0, 1:], fused[:, 2:4])
    assert torch.equal(values[0, 1:], fused[:, 4:])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.int8, 1 / 254), (torch.float8_e4m3fn, 1 / 16)])
def test_levels_are_as_near_as_stated(dtype, bound):
    key, value = (torch.randn(5, 3, 64) * torch.logspace(-20, 20, 15, 2).view(5, 3, 1) for _ in range(2))
    caches, scales = level_caches(dtype, (4, 8, 3, 64))
    kv_store(key, value, *caches, torch.tensor([3, 0, -1, 31, 8]), scales)
    for rows, cache, one in zip((key, value), caches, scales, strict=True):
        kept = gather_blocks(cache, one, torch.arange(4)).transpose(1, 2).flatten(0, 1)
        for row, slot in ((0, 3), (1, 0), (3, 31), (4, 8)):
            peaks = rows[row].abs().amax(-1, keepdim=True)
            limit = peaks * bound if dtype == torch.int8 else rows[row].abs() * bound + peaks * 2**-18
            assert ((kept[slot] - rows[row]).abs() <= limit * 1.0001).all()
        assert (kept.abs().amax((1, 2)) > 0).sum() == 4


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [10, 128])
def test_the_kernel_stores_the_same_bytes(dtype, head_dim, emulator):
    spread = torch.logspace(-12, 0, head_dim, 2)[torch.randperm(head_dim)]
    fused = (torch.randn(6, 9, head_dim) * spread).bfloat16()
    fused[2] = 0
    key, value = fused[:, 3:6], fused[:, 6:]
    slots = torch.tensor([7, 0, 31, -1, 8, 16])
    plain, compiled = (level_caches(dtype, (4, 8, 3, head_dim)) for _ in range(2))
    kv_store(key, value, *plain[0], slots, plain[1])
    launch_store_levels(emulator, key, value, *compiled[0], slots, compiled[1])
    for a, b in zip((*plain[0], *plain[1]), (*compiled[0], *compiled[1]), strict=True):
        assert torch.equal(a.view(torch.int8), b.view(torch.int8))


def level_caches(dtype, shape):
    blocks, size, heads, _ = shape
    scales = CacheScales(*(torch.zeros(blocks, heads, size) for _ in range(2)))
    return [torch.zeros(shape, dtype=dtype) for _ in range(2)], scales

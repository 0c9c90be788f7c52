"""Keys and values land in their slots and nowhere else."""

import torch

from cuda_kernels.kv_store import kv_store


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

"""The kernels of norm, rope, kv_store and route on the host emulator, against their torch oracles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_kernels import kv_store, norm, rope, routing
from cuda_kernels.linear import pack_dense
from tests.cuda_kernels.emulator.emulator import Emulator

BF16_STEP = 2**-7  # two roundings apart at most


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize(("num_tokens", "width"), [(0, 64), (1, 8), (2, 576), (1, 8200)])
@pytest.mark.parametrize("has_residual", [False, True])
def test_rms_norm(num_tokens: int, width: int, has_residual: bool, emulator: Emulator) -> None:
    x, weight = rows(num_tokens, width), rows(width)
    residual = rows(num_tokens, width + 1)[:, :width].contiguous() if has_residual else None
    normed, total = norm.launch_rms_norm(emulator, x, residual, weight, 1e-5)
    expected = (
        norm.add_rms_norm(x, residual, weight, 1e-5) if has_residual else (norm.rms_norm(x, weight, 1e-5), x)
    )
    torch.testing.assert_close(normed, expected[0], rtol=BF16_STEP, atol=1e-6)
    assert torch.equal(total, expected[1])


@pytest.mark.parametrize(
    ("num_tokens", "heads", "kv_heads", "head_dim"), [(0, 2, 1, 16), (3, 9, 3, 64), (1, 20, 4, 128)]
)
def test_rope_turns_a_view_of_the_projection_in_place(
    num_tokens: int, heads: int, kv_heads: int, head_dim: int, emulator: Emulator
) -> None:
    projected = rows(num_tokens, heads + 2 * kv_heads, head_dim)
    table = rope.cos_sin_table(50, head_dim, 10000.0)
    positions = torch.arange(num_tokens) * 7 % 50
    query, key, value = projected.clone().split([heads, kv_heads, kv_heads], dim=1)
    expected = rope.rope(query, key, positions, table)
    query, key, untouched = projected.split([heads, kv_heads, kv_heads], dim=1)
    rope.launch_rope(emulator, query, key, positions, table)
    torch.testing.assert_close(query, expected[0], rtol=BF16_STEP, atol=1e-2)
    torch.testing.assert_close(key, expected[1], rtol=BF16_STEP, atol=1e-2)
    assert torch.equal(untouched, value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kv_store_skips_padding(dtype: torch.dtype, emulator: Emulator) -> None:
    projected = rows(5, 4, 24).to(dtype)
    key, value = projected[:, :2], projected[:, 2:]
    slots = torch.tensor([3, -1, 0, 11, -1])
    caches = [torch.zeros(3, 4, 2, 24, dtype=dtype) for _ in range(4)]
    kv_store.launch_kv_store(emulator, key, value, *caches[:2], slots)
    kv_store.kv_store(key, value, *caches[2:], slots)
    assert torch.equal(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


def test_kv_store_names_what_does_not_fit(emulator: Emulator) -> None:
    cache = torch.zeros(1, 4, 1, 6, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="keys take 12 bytes"):
        kv_store.launch_kv_store(emulator, rows(1, 1, 6), rows(1, 1, 6), cache, cache, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"the cache holds torch\.float32"):
        kv_store.launch_kv_store(
            emulator, rows(1, 1, 8), rows(1, 1, 8), cache.float(), cache, torch.tensor([0])
        )


@settings(max_examples=12, deadline=None)
@given(num_tokens=st.integers(0, 9), num_experts=st.integers(2, 150), data=st.data())
def test_route(emulator_folder: object, num_tokens: int, num_experts: int, data: st.DataObject) -> None:
    activated = data.draw(st.integers(1, min(num_experts, 9)))
    logits = torch.randn(num_tokens, num_experts) * data.draw(st.sampled_from([0.0, 0.1, 20.0]))
    bias = torch.randn(num_experts) * 0.1
    emulator = Emulator(emulator_folder)  # type: ignore[arg-type]
    ids, weights = routing.launch_route(emulator, logits, bias, activated, 1e-12)
    expected_ids, expected_weights = routing.route(logits, bias, activated, 1e-12)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "width"),
    [(0, 4, 64), (1, 64, 576), (3, 41, 72), (4, 6, 4104), (5, 64, 576), (11, 42, 72), (128, 8, 64)],
)
def test_router_for_few_tokens(num_tokens: int, num_experts: int, width: int, emulator: Emulator) -> None:
    hidden, bias = rows(num_tokens, width), torch.zeros(num_experts)
    weight = torch.randn(num_experts, width, generator=torch.Generator().manual_seed(1)) * width**-0.5
    for _ in range(2):  # the counter is left as it was
        ids, weights = routing.launch_router(emulator, hidden, weight, bias, 3, 1e-12)
    wanted = routing.choose_experts(hidden, pack_dense(weight), bias, 3, 1e-12)
    assert torch.equal(ids, wanted[0])
    torch.testing.assert_close(weights, wanted[1], rtol=1e-4, atol=1e-6)


def test_a_tokens_logits_do_not_depend_on_how_many_there_are(emulator: Emulator) -> None:
    hidden, bias = rows(9, 2056), torch.zeros(8)
    weight = torch.randn(8, 2056, generator=torch.Generator().manual_seed(1)) / 40
    together = routing.launch_router(emulator, hidden, weight, bias, 8, 1e-12)[1]
    for index in range(9):
        alone = routing.launch_router(emulator, hidden[index : index + 1], weight, bias, 8, 1e-12)[1]
        assert torch.equal(alone[0], together[index])


def test_route_of_equal_scores_takes_the_lower_id_and_of_nans_a_legal_one(emulator: Emulator) -> None:
    logits = torch.zeros(2, 40)
    logits[1] = torch.nan
    ids, weights = routing.launch_route(emulator, logits, torch.zeros(40), 3, 1e-12)
    assert ids[0].tolist() == [0, 1, 2]
    assert ids[1].max() < 40
    assert weights[1].isnan().all()


def test_too_many_experts_are_named(emulator: Emulator) -> None:
    with pytest.raises(ValueError, match="num_experts: the kernel takes at most 512, got 513"):
        routing.launch_route(emulator, torch.zeros(1, 513), torch.zeros(513), 2, 1e-12)
    with pytest.raises(ValueError, match="num_experts_per_token: the kernel chooses at most 32, got 33"):
        routing.launch_route(emulator, torch.zeros(1, 64), torch.zeros(64), 33, 1e-12)

"""The attention kernels on the host emulator, and the torch form for other shapes, against float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_kernels import attention_kernels as op
from tests.cuda_kernels.attention_cases import Case, Lengths, case, expected
from tests.cuda_kernels.emulator.emulator import Emulator

TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}  # weights and results are rounded to bfloat


def check(out: torch.Tensor, of: Case) -> None:
    torch.testing.assert_close(out.double(), expected(of), **TOLERANCE)


def launch(emulator: Emulator, of: Case) -> torch.Tensor:
    return op.launch_attention(emulator, of.query, of.step, of.max_query_len, of.scale)


@pytest.mark.parametrize("is_hopper", [False, True])
@pytest.mark.parametrize(("heads", "head_dim"), [((3, 3), 64), ((9, 3), 64), ((16, 2), 128), ((16, 1), 64)])
@pytest.mark.parametrize(
    "lengths",
    [((1, 1),), ((1, 16), (1, 17), (1, 300)), ((70, 70),), ((30, 100), (1, 5), (2, 2))],
    ids=["one token", "decode", "prefill", "mixed"],
)
def test_kernels_agree_with_softmax_attention(
    heads: tuple[int, int], head_dim: int, lengths: Lengths, is_hopper: bool, emulator: Emulator
) -> None:
    step = case(lengths, heads, head_dim)
    check(launch(replace(emulator, has_warpgroup_products=is_hopper), step), step)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((16, 2), 128)])
def test_caches_of_levels(
    dtype: torch.dtype, heads: tuple[int, int], head_dim: int, emulator: Emulator
) -> None:
    step = case(((30, 100), (1, 5), (1, 300), (2, 2)), heads, head_dim, 32, dtype=dtype)
    check(launch(emulator, step), step)


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 150)), min_size=1, max_size=4),
    block_bits=st.integers(4, 6),
    seed=st.integers(0, 9),
)
def test_any_mixture(
    emulator_folder: object, lengths: list[tuple[int, int]], block_bits: int, seed: int
) -> None:
    step = case(tuple((new, old + new) for new, old in lengths), (4, 2), 64, 2**block_bits, seed)
    device = Emulator(emulator_folder, seed=seed, has_warpgroup_products=seed % 2 == 0)  # type: ignore[arg-type]
    check(launch(device, step), step)


def test_shares_meet_in_one_order(emulator_folder: object, emulator: Emulator) -> None:
    """Whatever threads run first, and again after the counters were used."""
    step = case(((1, 700),), (8, 1), 64)
    first = launch(emulator, step)
    other = Emulator(emulator_folder, seed=3)  # type: ignore[arg-type]
    assert torch.equal(launch(other, step), first)
    assert torch.equal(launch(other, step), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_form_for_other_shapes(dtype: torch.dtype) -> None:
    of = case(((30, 100), (1, 5), (2, 2)), (6, 2), head_dim=24, block_size=4, past=3e4)
    step = op.Step(of.step.key_cache_BPGC.to(dtype), of.step.value_cache_BPGC.to(dtype), *_rest(of.step))
    assert not op.has_kernel(of.query.to(dtype), step)
    check(op.attention_by_token(of.query.to(dtype), step, of.scale), of)


def _rest(step: op.Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return step.block_tables_SM, step.cu_seqlens_q, step.context_lens_S


@pytest.mark.parametrize("num_rows", [1, 8, 64, 512, 2048])
@pytest.mark.parametrize("max_context", [1, 64, 8192, 131072])
def test_shares_fill_the_gpu_and_no_more(num_rows: int, max_context: int) -> None:
    shares = op.choose_shares(num_rows, max_context, 132)
    assert 1 <= shares <= 32
    assert shares == 1 or (shares - 1) * 128 < max_context
    assert shares == 1 or (shares - 1) * num_rows < 4 * 132

"""The expert kernels, on the host emulator, against the float64 oracle; tilings; what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cuda_kernels import moe_wint2 as op
from cuda_kernels.expert_gemm import choose_gemm_tiling
from cuda_kernels.formats import layout
from cuda_kernels.launch import cuda_device
from cuda_kernels.packing import PackedWint2, unpack_local_scales
from tests.cuda_kernels.emulator.emulator import Emulator
from tests.cuda_kernels.generators import Layer, layer, packed

H100_SHARED_BYTES = 232448
H100 = Emulator(Path(), num_multiprocessors=132, shared_bytes=H100_SHARED_BYTES)


def error(out: torch.Tensor, layer: Layer) -> float:
    reference = op.moe_wint2(*layer.arguments).double()
    return float((out.double() - reference).norm() / reference.norm())


def all_to_one_expert(layer: Layer) -> Layer:
    layer.expert_ids.zero_()
    return layer


@pytest.mark.parametrize(
    ("case", "shared_bytes"),
    [
        (layer(1, 2, 1, 128, 128, k_order="natural"), H100_SHARED_BYTES),
        (layer(3, 4, 2, 576, 128, kind="grid"), H100_SHARED_BYTES),  # the demo model's widths: K padded
        (layer(3, 4, 2, 256, 136, kind="extreme", seed=3), H100_SHARED_BYTES),
        (all_to_one_expert(layer(20, 6, 1, 256, 136, k_order="natural")), H100_SHARED_BYTES),
        (layer(44, 36, 3, 256, 48), H100_SHARED_BYTES),  # too many rows for a CTA to sort by itself
        (layer(5, 4, 3, 640, 136), 102_000),  # too little shared memory for all of K: several passes
    ],
    ids=["one token", "padded K", "float codes", "tiles", "dispatch", "passes"],
)
def test_kernels_agree_with_the_oracle(case: Layer, shared_bytes: int, emulator: Emulator) -> None:
    emulator.shared_bytes = shared_bytes
    assert (
        error(op.launch_moe_wint2(emulator, *case.arguments), case) < 3e-3
    )  # of which bf16 of h and y is most


@pytest.mark.parametrize("kind", ["any", "grid", "extreme"])
def test_kernels_for_many_tokens_agree_with_the_oracle(kind: str, emulator: Emulator) -> None:
    """Many experts, so that their shares of the rows, and with them the tiles, are small."""
    case = layer(99, 4, 1, 192, 72, kind=kind, k_order="natural")
    assert op._choose_path(99, 99 / 4, H100_SHARED_BYTES) is op._launch_many
    assert error(op.launch_moe_wint2(emulator, *case.arguments), case) < 1e-3


@pytest.mark.parametrize("kind", ["any", "grid", "extreme"])
def test_kernels_for_several_rows_agree_with_the_oracle(kind: str, emulator: Emulator) -> None:
    case = layer(23, 4, 2, 640, 72, kind=kind)
    assert op._choose_path(23, 46 / 4, H100_SHARED_BYTES) is op._launch_several
    assert error(op.launch_moe_wint2(emulator, *case.arguments), case) < 1e-3


def test_no_order_of_threads_changes_a_bit(emulator_folder: Path) -> None:
    case = layer(3, 4, 2, 576, 128, kind="grid")
    outs = [op.launch_moe_wint2(Emulator(emulator_folder, seed=seed), *case.arguments) for seed in (0, 1, 2)]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_a_token_s_result_does_not_depend_on_its_neighbours(emulator: Emulator) -> None:
    case = layer(4, 4, 2, 576, 128, kind="grid")
    together = op.launch_moe_wint2(emulator, *case.arguments)
    hidden, ids, weights, up_gate, down = case.arguments
    for token in (slice(0, 3), slice(1, 4)):
        alone = op.launch_moe_wint2(emulator, hidden[token], ids[token], weights[token], up_gate, down)
        assert torch.equal(together[token], alone)


def bfloat_method(case: Layer) -> torch.Tensor:
    """The method's own arithmetic: local·super rounded to bfloat, the weight again, products of bfloat."""
    out = torch.zeros(case.hidden.shape, dtype=torch.float64)
    for token, slot in torch.cartesian_prod(*map(torch.arange, case.expert_ids.shape)).tolist():
        expert = int(case.expert_ids[token, slot])
        up_gate, down = (_bfloat_weights(weight, expert) for weight in (case.up_gate, case.down))
        x = torch.nn.functional.pad(case.hidden[token].double(), (0, up_gate.shape[0] - case.hidden.shape[1]))
        gate, up = (x @ up_gate.double()).bfloat16().chunk(2)
        h = (torch.nn.functional.silu(gate) * up).double()
        y = torch.nn.functional.pad(h, (0, down.shape[0] - len(h))) @ down.double()
        out[token] += y.bfloat16().double() * float(case.expert_weights[token, slot])
    return out.bfloat16()


def _bfloat_weights(packed: PackedWint2, expert: int) -> torch.Tensor:
    levels = op.dequantize_packed(replace(packed, super_scales=torch.ones_like(packed.super_scales)), expert)
    local = unpack_local_scales(packed)[expert].double().repeat_interleave(layout.GROUP_SIZE, dim=0)
    supers = op.dequantize_packed(packed, expert).abs().amax(0) / levels.abs().amax(0)
    level = torch.where(local > 0, levels / local, 0.0)
    return (level * (local * supers).bfloat16().double()).bfloat16()


@pytest.mark.parametrize("num_tokens", [3, 20])  # int8 pieces, half precision
@pytest.mark.parametrize("spread", [0, 12])
def test_error_is_no_larger_than_the_bfloat_method_s(
    num_tokens: int, spread: int, emulator: Emulator
) -> None:
    """Also for activations of very different sizes, in a row and between rows, and for a row of zeros."""
    case = layer(num_tokens, 6, 1, 256, 136, kind="grid")
    if spread:
        case.hidden.mul_(2.0 ** torch.randint(-spread, spread, case.hidden.shape))
        case.hidden[0, 0], case.hidden[1], case.hidden[2, 5] = 1e9, 0, 1e-30
    ours = op.launch_moe_wint2(emulator, *case.arguments)
    assert error(ours, case) <= error(bfloat_method(case), case)


def projected(emulator: Emulator, down: PackedWint2, rows: torch.Tensor) -> torch.Tensor:
    """Up to four rows by the first expert's down projection alone, float32."""
    num_rows = rows.shape[0]
    tiling = op._fit(2, 4, down.num_steps, emulator.shared_bytes)
    assert tiling is not None
    routed = op.route_rows(emulator, torch.zeros(num_rows, 1, dtype=torch.int32), 1, 4)
    out, weights = torch.zeros(num_rows, down.num_columns), torch.ones(num_rows, 1)
    op.project(emulator, down, tiling, routed, rows, out, weights)
    return out.double()


@pytest.mark.parametrize("outlier", [8, 40, 100, 1000])
def test_weights_that_shun_outliers_see_no_larger_error(outlier: float, emulator: Emulator) -> None:
    """What an outlier's presence does to the products of the others, beside bfloat without it."""
    torch.manual_seed(0)
    down = packed(1, 1024, 64, is_gated=False, kind="grid", k_order="natural")
    rows = torch.randn(4, 1024).bfloat16()
    shunned = torch.arange(1024) % 300 == 77  # in every third step
    rows[:, shunned] = 0
    bfloat = rows.double() @ _bfloat_weights(down, 0).double()
    of_bfloat = (bfloat - rows.double() @ op.dequantize_packed(down, 0)).norm(dim=1)
    rows[:, shunned] = outlier
    ours = projected(emulator, down, rows) - rows.double() @ op.dequantize_packed(down, 0)
    assert (ours.norm(dim=1) <= of_bfloat).all()


def test_int8_pieces_are_taken_where_they_are_nearly_exact(emulator: Emulator) -> None:
    """And halves for rows whose values are too different in size, or hold a NaN."""
    torch.manual_seed(0)
    down = packed(1, 1024, 64, is_gated=False, kind="grid", k_order="natural")
    rows = torch.randn(4, 1024).bfloat16()
    wanted = rows.double() @ op.dequantize_packed(down, 0)
    found = (projected(emulator, down, rows) - wanted).norm() / wanted.norm()
    assert 1e-5 < found < 1e-4
    rows[0, ::128], rows[1, 3] = 1e4, torch.nan
    wanted = rows.double() @ op.dequantize_packed(down, 0)
    found = projected(emulator, down, rows)
    assert found[1].isnan().all()
    for row in (0, 2, 3):
        assert (found[row] - wanted[row]).norm() < 1e-5 * wanted[row].norm()


def test_tiles_of_four_rows_go_in_pieces_and_of_eight_in_halves() -> None:
    assert [op.piece_rows(rows) for rows in (1, 2, 4, 8)] == [1, 2, 4, 0]


def test_tiles_are_as_full_as_an_expert_s_share_of_the_rows() -> None:
    """Of the 300B model: eight of 64 experts a token."""
    shares = {tokens: 8 * tokens / op.experts_used(tokens, 8, 64) for tokens in (1, 2, 3, 8, 24, 32)}
    rows = {tokens: op.tile_rows(tokens, share) for tokens, share in shares.items()}
    assert rows == {1: 1, 2: 2, 3: 4, 8: 4, 24: 4, 32: 8}


def test_no_tokens() -> None:
    assert op.moe_wint2(*layer(0, 2, 1, 128, 128).arguments).shape == (0, 128)


def test_wrong_sizes_are_named() -> None:
    case = layer(2, 2, 1, 128, 128)
    with pytest.raises(ValueError, match=r"hidden_TD: expected contiguous bfloat16 \[2, 128\], got"):
        op.moe_wint2(case.hidden.float(), *case.arguments[1:])
    with pytest.raises(ValueError, match=r"expert_weights_TA: expected contiguous float32 \[2, 1\]"):
        op.moe_wint2(case.hidden, case.expert_ids, case.expert_weights[:1], case.up_gate, case.down)
    with pytest.raises(ValueError, match=r"down: 256 padded rows do not fit up_gate's 128 features"):
        op.moe_wint2(*case.arguments[:4], layer(2, 2, 1, 128, 256).down)


@pytest.mark.parametrize("rows", [1, 2, 4, 8])
@pytest.mark.parametrize("num_steps", [1, 5, 28, 64, 224])
def test_tilings_fit_and_hold_the_rows(rows: int, num_steps: int) -> None:
    tiling = op.choose_tiling(rows, 8, 448, num_steps, H100)
    assert tiling.shared_bytes <= H100_SHARED_BYTES
    assert tiling.rows == rows
    assert 1 <= tiling.passes <= num_steps
    assert tiling.warps_n * tiling.warps_k == 16


@pytest.mark.parametrize("num_routed", [65, 512, 4096, 65536])
@pytest.mark.parametrize("has_products", [False, True])
def test_tilings_for_many_tokens_follow_the_experts_shares(num_routed: int, has_products: bool) -> None:
    device = Emulator(Path(), has_warpgroup_products=has_products)
    tiling = choose_gemm_tiling(num_routed, 64, device)
    assert tiling.shared_bytes * tiling.num_ctas <= H100_SHARED_BYTES
    assert tiling.tokens >= min(num_routed / 64, 128 if has_products else 64)
    assert tiling.stages >= 3


def test_a_decode_step_of_the_large_model_keeps_its_activations_at_hand() -> None:
    assert op.choose_tiling(1, 8, 448, 64, H100).passes == 1
    assert op.choose_tiling(8, 42, 448, 64, H100).passes == 1


def test_warps_share_a_pair_where_there_are_few_pairs() -> None:
    small, large = op.choose_tiling(1, 6, 96, 20, H100), op.choose_tiling(8, 42, 448, 64, H100)
    assert small.warps_k > large.warps_k


def test_experts_used_by_random_routings() -> None:
    assert op.experts_used(1, 8, 64) == 8
    assert 41 < op.experts_used(8, 8, 64) < 43
    assert op.experts_used(1000, 8, 64) == pytest.approx(64)


def test_a_device_too_small_for_any_tile_is_named() -> None:
    with pytest.raises(ValueError, match="10000 bytes of shared memory hold no tile of 1 rows"):
        op.choose_tiling(1, 8, 448, 64, Emulator(Path(), shared_bytes=10_000))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 5, 8, 9, 64, 65, 200, 600])
@pytest.mark.parametrize("k_order", ["natural", "shuffled"])
def test_gpu_agrees_with_the_oracle(num_tokens: int, k_order: str) -> None:
    case = layer(num_tokens, 16, 4, 1088, 400, k_order=k_order)
    arguments = [argument.to("cuda") for argument in case.arguments]
    assert error(op.launch_moe_wint2(cuda_device(0), *arguments).cpu(), case) < 3e-3


@pytest.mark.gpu
def test_gpu_result_is_the_same_from_a_graph() -> None:
    case = layer(3, 4, 2, 576, 128)
    arguments = [argument.to("cuda") for argument in case.arguments]
    eager = op.moe_wint2(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.moe_wint2(*arguments)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, eager)

"""The experts' feed-forward of a WINT2 layer: route rows to experts, gate and up with SwiGLU, down, combine.

T tokens, D hidden, F expert intermediate, E experts, A experts a token, R = T·A routed rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from cuda_kernels.build import Variant
from cuda_kernels.expert_batch import BATCH_ROWS, BATCH_SHARED_BYTES, batch_projection, batch_variants
from cuda_kernels.expert_gemm import SortedRows, choose_gemm_tiling, gemm_projection, gemm_variants
from cuda_kernels.formats import ccq, layout
from cuda_kernels.launch import Argument, Device, check, cuda_device
from cuda_kernels.packing import PackedWint2, code_points, unpack_codes, unpack_local_scales

# Routed rows an expert, on average, up to which the kernels for few and for several rows are used; more rows
# go to csrc/expert_gemm.cu. Few are also up to eight tokens: no expert then has more rows than one tile.
MAX_FEW_ROWS, MAX_SEVERAL_ROWS, MAX_FEW_TOKENS = 4, 24, 8

_WARPS, _THREADS = 16, 512
_SLOT_BYTES = 1152  # of one warp's ring: one 128-step of a pair
_WARPS_K = 1, 2, 4, 8  # that may share a pair
_PIECE_ROWS = 4  # an mma of int8 holds both pieces of so many
_MAX_PIECE_ROWS = 3.5  # an expert, on average, up to which tiles of so many are less work than tiles of eight
_PANEL_STEPS = 3  # what beginning and ending a panel takes, in steps
_MAX_SORTED_HERE = 128  # routed rows that a projection sorts by itself


def moe_wint2(
    hidden_TD: Tensor,
    expert_ids_TA: Tensor,
    expert_weights_TA: Tensor,
    up_gate: PackedWint2,
    down: PackedWint2,
) -> Tensor:
    """Σ over a token's experts of weight · down(silu(gate(x)) · up(x)): bf16 [T, D].

    `hidden_TD` bf16, `expert_ids_TA` int32, `expert_weights_TA` f32; no id twice in a row. Weights count
    exactly as level · local scale · super scale, activations as they are; sums are float32, h is bf16.
    """
    _check(hidden_TD, expert_ids_TA, expert_weights_TA, up_gate, down)
    if hidden_TD.shape[0] == 0:
        return hidden_TD.clone()
    if hidden_TD.is_cuda:
        device = cuda_device(hidden_TD.device.index or 0)
        return launch_moe_wint2(device, hidden_TD, expert_ids_TA, expert_weights_TA, up_gate, down)
    return _reference(hidden_TD, expert_ids_TA, expert_weights_TA, up_gate, down)


def _check(hidden: Tensor, ids: Tensor, weights: Tensor, up_gate: PackedWint2, down: PackedWint2) -> None:
    num_tokens, width = hidden.shape
    check("hidden_TD", hidden, (num_tokens, down.num_columns), (torch.bfloat16,))
    check("expert_ids_TA", ids, (num_tokens, None), (torch.int32,))
    check("expert_weights_TA", weights, tuple(ids.shape), (torch.float32,))
    if not up_gate.num_rows - 128 < width <= up_gate.num_rows or down.num_features % 8:
        raise ValueError(f"hidden_TD: width {width} does not fit up_gate's {up_gate.num_rows} padded rows")
    if not down.num_rows - 128 < up_gate.num_features <= down.num_rows:
        features = up_gate.num_features
        raise ValueError(f"down: {down.num_rows} padded rows do not fit up_gate's {features} features")


def dequantize_packed(packed: PackedWint2, expert: int) -> Tensor:
    """One expert's weights as the kernel counts them, f64 [K, N] in true row order."""
    one = packed.map_tensors(lambda tensor: tensor[expert : expert + 1])
    codes = code_points(one)[0].gather(0, unpack_codes(one)[0].long())
    levels = layout.to_rows(ccq.fields(codes), packed.k_order).double()
    local = unpack_local_scales(one)[0].double().repeat_interleave(layout.GROUP_SIZE, dim=0)
    return levels * local * _super_scales(one).double()


def _super_scales(one: PackedWint2) -> Tensor:
    scales = one.super_scales[0]
    if one.is_gated:
        scales = scales.transpose(0, 1).flatten(1)[:, : one.num_features]
    return scales.flatten()[: one.num_columns]


def _reference(
    hidden: Tensor, ids: Tensor, weights: Tensor, up_gate: PackedWint2, down: PackedWint2
) -> Tensor:
    out = torch.zeros(hidden.shape, dtype=torch.float64, device=hidden.device)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (_padded(hidden[token], up_gate) @ dequantize_packed(up_gate, expert)).chunk(2, dim=1)
        h = (torch.nn.functional.silu(gate) * up).to(hidden.dtype)
        y = _padded(h, down) @ dequantize_packed(down, expert)
        out.index_add_(0, token, y * weights[token, slot].double().unsqueeze(1))
    return out.to(hidden.dtype)


def _padded(rows: Tensor, packed: PackedWint2) -> Tensor:
    return torch.nn.functional.pad(rows.double(), (0, packed.num_rows - rows.shape[1]))


@dataclass(frozen=True)
class Tiling:
    """How one projection is cut; see csrc/moe_wint2.cu."""

    warps_k: int
    rows: int  # of a token tile
    passes: int
    shared_bytes: int

    @property
    def warps_n(self) -> int:
        return _WARPS // self.warps_k


def tile_rows(num_tokens: int, rows_per_expert: float) -> int:
    """Rows of a token tile for `num_tokens`, of whose rows each expert that is used has `rows_per_expert`.

    Up to four, the smallest that holds one row a token. An H200 took 0.8 of the time by tiles of four than by
    tiles of eight at 16 tokens of the 300B model (2.2 rows), 0.9 at 24 (3.1), 1.09 at 32 (4.1).
    """
    if rows_per_expert > _MAX_PIECE_ROWS:
        return 8
    return next((rows for rows in (1, 2) if num_tokens <= rows), _PIECE_ROWS)


def choose_tiling(rows: int, num_tiles: float, pairs: int, steps: int, device: Device) -> Tiling:
    """The tiling for `num_tiles` token tiles of up to `rows` rows; P `pairs`, K/128 `steps`.

    Warps along K: of those that take the least time the fewest. Passes: as few as let a tile's activations
    fit.
    """
    fitting = [tiling for warps_k in _WARPS_K if (tiling := _fit(warps_k, rows, steps, device.shared_bytes))]
    if not fitting:
        raise ValueError(f"{device.shared_bytes} bytes of shared memory hold no tile of {rows} rows")
    return min(fitting, key=lambda tiling: _time(tiling, num_tiles, pairs, steps, device.num_multiprocessors))


def _fit(warps_k: int, rows: int, steps: int, shared_limit: int) -> Tiling | None:
    for passes in range(1, steps + 1):
        needed = _shared_bytes(warps_k, rows, -(-steps // passes))
        if needed <= shared_limit:
            return Tiling(warps_k, rows, passes, needed)
    return None


def _time(tiling: Tiling, num_tiles: float, pairs: int, steps: int, num_ctas: int) -> float:
    """Of the busiest CTA's panels, in steps of one warp."""
    panels = math.ceil(num_tiles * math.ceil(pairs / tiling.warps_n) / num_ctas)
    return panels * tiling.passes * (math.ceil(steps / tiling.passes / tiling.warps_k) + _PANEL_STEPS)


def experts_used(num_tokens: int, experts_per_token: int, num_experts: int) -> float:
    """How many experts some token goes to, on average over random routings."""
    missed = (1 - experts_per_token / num_experts) ** num_tokens
    return num_experts * (1 - missed)


def piece_rows(tile_rows: int) -> int:
    """Up to how many rows a token tile is multiplied as int8 pieces (csrc/expert_pieces.cuh); 0: none is.

    Four rows fill an mma of int8; more take two, and by their instructions gain nothing. Tiles of eight are
    all taken in half precision, those that happen to be less full as well: the others would be waited for.
    """
    return tile_rows if tile_rows <= _PIECE_ROWS else 0


def _stages(rows: int) -> int:
    """Of a warp's ring: a fourth is worth 1.5 % at one token; eight rows leave no room for it."""
    return 4 if rows <= _PIECE_ROWS else 3


def _shared_bytes(warps_k: int, rows: int, steps: int) -> int:
    rings = _WARPS * _stages(rows) * _SLOT_BYTES
    padding = 128 // warps_k if warps_k > 4 else 0
    partials = 2 * _WARPS * (256 + padding) * 4 if warps_k > 1 else 2 * _MAX_SORTED_HERE * 4
    activations = steps * max(128 + 256 * rows, 144 + 256 * piece_rows(rows)) + _WARPS * 8 + rows * 4
    sorted_here = 5 * _MAX_SORTED_HERE * 4 + 4
    return rings + 64 + partials + activations + sorted_here


def projection_variants() -> list[Variant]:
    """Every variant that `choose_tiling` may ask for."""
    return [_variant(*shape) for shape in product((False, True), _WARPS_K, (1, 2, 4, 8))]


def moe_wint2_variants() -> list[Variant]:
    """Every kernel of a layer's experts but those of `routing`, for any number of tokens."""
    return projection_variants() + batch_variants() + gemm_variants()


def _variant(is_gated: bool, warps_k: int, rows: int) -> Variant:
    defines = {"GATED": int(is_gated), "WARPS_K": warps_k, "ROWS": rows, "STAGES": _stages(rows)}
    defines["PIECES"] = piece_rows(rows)
    return Variant("moe_wint2", tuple(defines.items()))


@dataclass(frozen=True, eq=False)
class _Layer:
    """One call of the op: what goes in, and where h and the rows of y go."""

    device: Device
    hidden_TD: Tensor
    ids_TA: Tensor
    weights_TA: Tensor
    up_gate: PackedWint2
    down: PackedWint2
    h_RF: Tensor
    y_RD: Tensor


def launch_moe_wint2(
    device: Device,
    hidden_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    up_gate: PackedWint2,
    down: PackedWint2,
) -> Tensor:
    """The same by the kernels, without synchronisation: three launches for few tokens, six for many."""
    num_routed, width = ids_TA.numel(), hidden_TD.shape[1]
    h_RF = hidden_TD.new_empty((num_routed, up_gate.num_features))
    y_RD = hidden_TD.new_empty((num_routed, width), dtype=torch.float32)
    run = _choose_path(hidden_TD.shape[0], num_routed / up_gate.num_experts, device.shared_bytes)
    run(_Layer(device, hidden_TD, ids_TA, weights_TA, up_gate, down, h_RF, y_RD))
    out_TD = torch.empty_like(hidden_TD)
    combine: list[Argument] = [y_RD, out_TD, width, ids_TA.shape[1]]
    grid = hidden_TD.shape[0], -(-width // 512)
    device.launch(Variant("routing"), "combine", grid, 128, 0, combine, overlaps=True)
    return out_TD


def _choose_path(num_tokens: int, rows_per_expert: float, shared_limit: int) -> Callable[[_Layer], None]:
    several = _launch_several if shared_limit >= BATCH_SHARED_BYTES else _launch_few
    if num_tokens <= MAX_FEW_TOKENS or rows_per_expert <= MAX_FEW_ROWS:
        return _launch_few
    return several if rows_per_expert <= MAX_SEVERAL_ROWS else _launch_many


def _launch_few(of: _Layer) -> None:
    num_tokens, experts_per_token = of.ids_TA.shape
    used = experts_used(num_tokens, experts_per_token, of.up_gate.num_experts)
    rows = tile_rows(num_tokens, of.ids_TA.numel() / used)
    tiles = max(used, of.ids_TA.numel() / rows)
    tiling, down_tiling = (
        choose_tiling(rows, tiles, packed.num_pairs, packed.num_steps, of.device)
        for packed in (of.up_gate, of.down)
    )
    routed = route_rows(of.device, of.ids_TA, of.up_gate.num_experts, tiling.rows)
    project(of.device, of.up_gate, tiling, routed, of.hidden_TD, of.h_RF, None)
    project(of.device, of.down, down_tiling, routed, of.h_RF, of.y_RD, of.weights_TA)


def _launch_several(of: _Layer) -> None:
    rows = sort_rows(of.device, of.ids_TA, of.up_gate.num_experts, BATCH_ROWS)
    batch_projection(of.device, of.up_gate, rows, of.hidden_TD, of.h_RF, None)
    batch_projection(of.device, of.down, rows, of.h_RF, of.y_RD, of.weights_TA)


def _launch_many(of: _Layer) -> None:
    tiling = choose_gemm_tiling(of.ids_TA.numel(), of.up_gate.num_experts, of.device)
    rows = sort_rows(of.device, of.ids_TA, of.up_gate.num_experts, tiling.tokens)
    gemm_projection(of.device, of.up_gate, tiling, rows, of.hidden_TD, of.h_RF, None)
    gemm_projection(of.device, of.down, tiling, rows, of.h_RF, of.y_RD, of.weights_TA)


@dataclass(frozen=True, eq=False)
class Routed:
    """Routed rows by expert; few of them are left for the projections to sort."""

    ids_TA: Tensor
    max_tiles: int
    rows: SortedRows | None


def route_rows(device: Device, ids_TA: Tensor, num_experts: int, tile_rows: int) -> Routed:
    if ids_TA.numel() > _MAX_SORTED_HERE:
        rows = sort_rows(device, ids_TA, num_experts, tile_rows)
        return Routed(ids_TA, rows.tiles.shape[0], rows)
    return Routed(ids_TA, _max_tiles(ids_TA.numel(), num_experts, tile_rows), None)


def _max_tiles(num_routed: int, num_experts: int, tile_rows: int) -> int:
    return min(num_routed, num_experts + num_routed // tile_rows)


def sort_rows(device: Device, ids_TA: Tensor, num_experts: int, tile_rows: int) -> SortedRows:
    num_routed = ids_TA.numel()
    shapes = ((num_routed,), (_max_tiles(num_routed, num_experts, tile_rows), 4), (1,))
    sorted_R, tiles, num_tiles = (ids_TA.new_empty(shape) for shape in shapes)
    arguments: list[Argument] = [ids_TA, num_routed, num_experts, tile_rows, sorted_R, tiles, num_tiles]
    device.launch(Variant("routing"), "dispatch", (1, 1), 1024, (33 * num_experts + 1) * 4, arguments)
    return SortedRows(sorted_R, tiles, num_tiles, ids_TA.shape[1])


def project(
    device: Device,
    packed: PackedWint2,
    tiling: Tiling,
    routed: Routed,
    rows: Tensor,
    out: Tensor,
    expert_weights: Tensor | None,
) -> None:
    grid = device.num_multiprocessors
    panels = -(-packed.num_pairs // tiling.warps_n)
    panels_kept = min(panels, -(-routed.max_tiles * panels // grid))  # in a tile, at most
    scratch_shape = (grid, panels_kept, tiling.warps_n, 256) if tiling.passes > 1 else (1,)
    strides = (16, 2) if packed.k_order == "natural" else (2, 8)
    arguments: list[Argument] = [packed.records, packed.channels, packed.arithmetic, packed.super_scales]
    arguments += [packed.num_pairs, packed.num_steps, rows, rows.shape[1], rows.shape[1], *strides]
    arguments += [routed.ids_TA, routed.ids_TA.numel(), routed.ids_TA.shape[1]]
    arguments += routed.rows.arguments if routed.rows else [None, None, None]
    arguments += [out, expert_weights, out.new_empty(scratch_shape, dtype=torch.float32)]
    arguments += [packed.num_features, panels_kept, tiling.passes]
    variant = _variant(packed.is_gated, tiling.warps_k, tiling.rows)
    kernel, shared = "expert_projection", tiling.shared_bytes
    device.launch(variant, kernel, (grid, 1), _THREADS, shared, arguments, overlaps=True)

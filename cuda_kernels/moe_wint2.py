"""The experts' feed-forward of a WINT2 layer: route rows to experts, gate and up with SwiGLU, down, combine.

T tokens, D hidden, F expert intermediate, E experts, A experts a token, R = T·A routed rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.build import Variant
from cuda_kernels.formats import ccq, layout
from cuda_kernels.launch import Argument, Device, check, cuda_device
from cuda_kernels.packing import PackedWint2, code_points, unpack_codes, unpack_local_scales

_WARPS, _THREADS = 16, 512
_SLOT_BYTES = 1152  # of one warp's ring: one 128-step of a pair
_MAX_STAGES = 6


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
    stages: int
    passes: int
    shared_bytes: int

    @property
    def warps_n(self) -> int:
        return _WARPS // self.warps_k


def choose_tiling(num_tokens: int, num_steps: int, shared_limit: int) -> Tiling:
    """The tiling for at most `num_tokens` rows an expert and `num_steps` 128-steps of K.

    Rows: the smallest tile that holds one row a token, up to 16. Warps along K: a divisor of the steps if
    there is one, so that no warp waits. Passes: as few as let a tile's activations fit beside three stages.
    """
    rows = next((n for n in (1, 2, 4, 8) if num_tokens <= n), 16)
    choices = (8, 4) if rows <= 8 else (4,)
    warps_k = next((n for n in choices if num_steps % n == 0), choices[-1])
    for passes in range(1, num_steps + 1):
        for stages in range(_MAX_STAGES, 2, -1):
            needed = _shared_bytes(warps_k, rows, stages, -(-num_steps // passes))
            if needed <= shared_limit:
                return Tiling(warps_k, rows, stages, passes, needed)
    raise ValueError(f"{shared_limit} bytes of shared memory hold no tile of {rows} rows")


def _shared_bytes(warps_k: int, rows: int, stages: int, steps: int) -> int:
    token_tiles = -(-rows // 8)
    splits = 4 * warps_k // _WARPS
    partial = token_tiles * _WARPS * (256 + 32 // splits) * 4
    activations = steps * (128 * token_tiles + 256 * rows) + rows * 4
    return _WARPS * stages * _SLOT_BYTES + 16 + partial + activations


def projection_variants() -> list[Variant]:
    """Every variant that `choose_tiling` may ask for on a device with Hopper's shared memory."""
    tilings = {(8, rows, stages) for rows in (1, 2, 4, 8) for stages in (3, _MAX_STAGES)}
    tilings |= {(4, rows, stages) for rows in (1, 8, 16) for stages in (3, _MAX_STAGES)}
    return [_variant(gated, *tiling) for gated in (False, True) for tiling in sorted(tilings)]


def _variant(is_gated: bool, warps_k: int, rows: int, stages: int) -> Variant:
    defines = {"GATED": int(is_gated), "WARPS_K": warps_k, "ROWS": rows, "STAGES": stages}
    return Variant("moe_wint2", tuple(defines.items()))


def launch_moe_wint2(
    device: Device,
    hidden_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    up_gate: PackedWint2,
    down: PackedWint2,
) -> Tensor:
    """The same by the kernels, four launches and no synchronisation."""
    (num_tokens, width), num_routed = hidden_TD.shape, ids_TA.numel()
    new = hidden_TD.new_empty
    tiling = choose_tiling(num_tokens, up_gate.num_steps, device.shared_bytes)
    down_tiling = choose_tiling(num_tokens, down.num_steps, device.shared_bytes)
    routed = _Routed(
        sorted=new(num_routed, dtype=torch.int32),
        tiles=new((_max_tiles(num_routed, up_gate.num_experts, tiling.rows), 4), dtype=torch.int32),
        num_tiles=new(1, dtype=torch.int32),
        hidden_max=new(num_tokens, dtype=torch.int32),
        h_max=new(num_routed, dtype=torch.int32),
        experts_per_token=ids_TA.shape[1],
    )
    h_RF = new((num_routed, up_gate.num_features))
    y_RD = new((num_routed, width), dtype=torch.float32)
    out_TD = new((num_tokens, width))
    routing = Variant("routing")
    sort_bytes = (33 * up_gate.num_experts + 1) * 4
    dispatch: list[Argument] = [ids_TA, num_routed, up_gate.num_experts, tiling.rows, hidden_TD, width // 2]
    dispatch += [routed.sorted, routed.tiles, routed.num_tiles, routed.hidden_max, routed.h_max]
    device.launch(routing, "dispatch", (1 + num_tokens, 1), 1024, max(sort_bytes, 128), dispatch)
    _project(device, up_gate, tiling, routed, hidden_TD, routed.hidden_max, h_RF, None)
    _project(device, down, down_tiling, routed, h_RF, routed.h_max, y_RD, weights_TA)
    combine: list[Argument] = [y_RD, out_TD, width, ids_TA.shape[1]]
    device.launch(routing, "combine", (num_tokens, -(-width // 1024)), 256, 0, combine)
    return out_TD


@dataclass(frozen=True, eq=False)
class _Routed:
    """What dispatch writes."""

    sorted: Tensor
    tiles: Tensor
    num_tiles: Tensor
    hidden_max: Tensor
    h_max: Tensor
    experts_per_token: int


def _max_tiles(num_routed: int, num_experts: int, rows: int) -> int:
    return min(num_routed, num_experts + num_routed // rows)


def _project(
    device: Device,
    packed: PackedWint2,
    tiling: Tiling,
    routed: _Routed,
    rows: Tensor,
    rows_max: Tensor,
    out: Tensor,
    expert_weights: Tensor | None,
) -> None:
    panels = -(-packed.num_pairs // tiling.warps_n)
    grid = device.num_multiprocessors
    panels_kept = min(panels, -(-routed.tiles.shape[0] * panels // grid) + 1)
    token_tiles = -(-tiling.rows // 8)
    scratch_shape = (grid, panels_kept, token_tiles, 4, 256) if tiling.passes > 1 else (1,)
    strides = (16, 2) if packed.k_order == "natural" else (2, 8)
    arguments: list[Argument] = [packed.records, packed.channels, packed.arithmetic, packed.super_scales]
    arguments += [packed.num_pairs, packed.num_steps]
    arguments += [rows, rows_max, rows.shape[1], rows.shape[1], *strides]
    arguments += [routed.sorted, routed.experts_per_token, routed.tiles, routed.num_tiles]
    arguments += [out, routed.h_max, expert_weights, out.new_empty(scratch_shape, dtype=torch.float32)]
    arguments += [packed.num_features, panels_kept, tiling.passes]
    variant = _variant(packed.is_gated, tiling.warps_k, tiling.rows, tiling.stages)
    device.launch(variant, "expert_projection", (grid, 1), _THREADS, tiling.shared_bytes, arguments)

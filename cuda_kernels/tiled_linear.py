"""Op `tiled_linear`: x · Wᵀ with a weight of 4, 8 or 16 bits, alone, with SwiGLU, or as experts (2 bits too).

Shapes: T tokens, K inputs, N outputs, D hidden, F intermediate, A experts a token, R = T·A routed rows.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from cuda_kernels.build import Variant
from cuda_kernels.launch import Argument, Device, check, cuda_device
from cuda_kernels.tiled import Bits, TiledWeight, unpack_tiled
from cuda_kernels.tiled_batch import batch_linear, batch_linear_variants, choose_batch_tiling

_PLAIN, _GATED, _WEIGHTED = 0, 1, 2
_SUMS_STRIDE = 36
_TOKEN_TILES = (1, 2, 4, 8)  # of eight rows each
_SHARING_PAIRS = (1, 2, 4)
# Beyond it, a dequantized copy for the matrix library costs less than streaming the weight for every tile.
MAX_STREAMED_ROWS = 128
MAX_FEW_ROWS = 16  # beyond it, outputs share x through shared memory


def stages_and_blocks(bits: Bits, token_tiles: int) -> tuple[int, int]:
    """Chunks in flight a warp, and blocks of eight warps that a multiprocessor's registers hold."""
    if bits == 2:
        return (2, 2) if token_tiles <= 2 else (3, 1)
    match token_tiles:
        case 1:
            return (3, 3) if bits == 8 else (4, 2)
        case 2:
            return 4, 2
        case 4:
            return (3, 1) if bits == 4 else (3, 2)
    return 4, 1


def tiled_linear(x_TK: Tensor, weight: TiledWeight) -> Tensor:
    """x times the weight, transposed: bfloat16 [T, N], or [T, N/2] after SwiGLU of a gated weight."""
    if not x_TK.is_cuda:
        return swiglu(x_TK.float() @ unpack_tiled(weight).T, weight).to(x_TK.dtype)
    device = cuda_device(x_TK.device.index)
    if x_TK.shape[0] <= MAX_STREAMED_ROWS or weight.scales is None:
        return launch_tiled_linear(device, x_TK, weight)
    return swiglu(F.linear(x_TK, launch_untile(device, weight)), weight)


def swiglu(y_TN: Tensor, weight: TiledWeight) -> Tensor:
    """silu(gate) · up of a gated weight's outputs."""
    if not weight.is_gated:
        return y_TN
    gate, up = y_TN.chunk(2, dim=-1)
    return F.silu(gate) * up


def launch_tiled_linear(device: Device, x_TK: Tensor, weight: TiledWeight) -> Tensor:
    """The same by the kernels that stream the weight."""
    num_tokens = x_TK.shape[0]
    check("x_TK", x_TK, (num_tokens, weight.num_inputs), (torch.bfloat16,))
    y_TN = x_TK.new_empty((num_tokens, weight.num_features))
    if num_tokens == 0:
        return y_TN
    resources = device.num_multiprocessors, device.shared_bytes
    tiling = choose_batch_tiling(weight.bits, num_tokens, weight.num_pairs, *resources)
    if tiling and num_tokens > MAX_FEW_ROWS:
        batch_linear(device, x_TK, weight, tiling, y_TN)
    else:
        _launch_few(device, x_TK, weight, y_TN)
    return y_TN


def _launch_few(device: Device, x_TK: Tensor, weight: TiledWeight, y_TN: Tensor) -> None:
    num_tokens, kind = x_TK.shape[0], _GATED if weight.is_gated else _PLAIN
    token_tiles = choose_token_tiles(num_tokens)
    num_tiles = -(-num_tokens // (8 * token_tiles))
    rows: list[Argument] = [num_tokens, None, 0, None, None]
    _launch(device, weight, kind, token_tiles, num_tiles, x_TK, rows, y_TN, None)


def launch_untile(device: Device, weight: TiledWeight) -> Tensor:
    """The weight as bfloat16 [N, K], every product level · scale rounded."""
    out_NK = torch.empty(
        (weight.num_outputs, weight.num_inputs), dtype=torch.bfloat16, device=weight.tiles.device
    )
    half = weight.num_features if weight.is_gated else 0
    grid = weight.num_pairs, -(-weight.num_chunks // 8)
    arguments: list[Argument] = [weight.tiles, weight.scales, out_NK, weight.num_pairs, weight.num_chunks]
    arguments += [weight.num_outputs, weight.num_inputs, half]
    device.launch(
        Variant("untile", (("BITS", weight.bits),)), "untile", grid, 256, 0, arguments, overlaps=True
    )
    return out_NK


def moe_tiled(
    hidden_TD: Tensor,
    expert_ids_TA: Tensor,
    expert_weights_TA: Tensor,
    up_gate: TiledWeight,
    down: TiledWeight,
) -> Tensor:
    """Σ over a token's experts of weight · down(silu(gate(x)) · up(x)): bfloat16 [T, D]."""
    if hidden_TD.is_cuda:
        device = cuda_device(hidden_TD.device.index)
        return launch_moe_tiled(device, hidden_TD, expert_ids_TA, expert_weights_TA, up_gate, down)
    out_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32)
    for expert in expert_ids_TA.unique().tolist():
        token, slot = (expert_ids_TA == expert).nonzero(as_tuple=True)
        inner = swiglu(hidden_TD[token].float() @ unpack_tiled(up_gate, expert).T, up_gate)
        y = inner.to(hidden_TD.dtype).float() @ unpack_tiled(down, expert).T
        out_TD.index_add_(0, token, y * expert_weights_TA[token, slot].unsqueeze(1))
    return out_TD.to(hidden_TD.dtype)


def launch_moe_tiled(
    device: Device,
    hidden_TD: Tensor,
    ids_TA: Tensor,
    weights_TA: Tensor,
    up_gate: TiledWeight,
    down: TiledWeight,
) -> Tensor:
    """The same by the kernels: sort, up and gate with SwiGLU, down, combine; no synchronisation."""
    (num_tokens, width), (num_routed, activated) = hidden_TD.shape, (ids_TA.numel(), ids_TA.shape[1])
    check("hidden_TD", hidden_TD, (num_tokens, up_gate.num_inputs), (torch.bfloat16,))
    check("expert_ids_TA", ids_TA, (num_tokens, None), (torch.int32,))
    check("expert_weights_TA", weights_TA, (num_tokens, activated), (torch.float32,))
    out_TD, h_RF = torch.empty_like(hidden_TD), hidden_TD.new_empty((num_routed, up_gate.num_features))
    if num_tokens == 0:
        return out_TD
    y_RD = h_RF.new_empty((num_routed, width), dtype=torch.float32)
    token_tiles = choose_token_tiles(min(num_tokens, -(-2 * num_routed // up_gate.num_experts)))
    sorted_R, tiles, num_tiles = _sort(device, ids_TA, up_gate.num_experts, 8 * token_tiles)
    for weight, kind, x, y, divisor in (
        (up_gate, _GATED, hidden_TD, h_RF, activated),
        (down, _WEIGHTED, h_RF, y_RD, 0),
    ):
        rows: list[Argument] = [num_routed, sorted_R, divisor, tiles, num_tiles]
        _launch(device, weight, kind, token_tiles, len(tiles), x, rows, y, weights_TA)
    combine: list[Argument] = [y_RD, out_TD, width, activated]
    device.launch(
        Variant("routing"), "combine", (num_tokens, -(-width // 512)), 128, 0, combine, overlaps=True
    )
    return out_TD


def _sort(device: Device, ids_TA: Tensor, num_experts: int, tile_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Routed rows by expert: (token·A + slot of each [R], tiles (expert, first, rows, -), how many)."""
    num_routed = ids_TA.numel()
    max_tiles = min(num_routed, num_experts + num_routed // tile_rows)
    sorted_R = ids_TA.new_empty(num_routed)
    tiles, num_tiles = ids_TA.new_empty((max_tiles, 4)), ids_TA.new_empty(1)
    arguments: list[Argument] = [ids_TA, num_routed, num_experts, tile_rows, sorted_R, tiles, num_tiles]
    device.launch(
        Variant("routing"), "dispatch", (1, 1), 1024, (33 * num_experts + 1) * 4, arguments, overlaps=True
    )
    return sorted_R, tiles, num_tiles


def choose_token_tiles(num_rows: int) -> int:
    """The smallest tile, in eights, that holds that many rows; at most eight."""
    return next((tiles for tiles in _TOKEN_TILES if num_rows <= 8 * tiles), _TOKEN_TILES[-1])


def choose_warps(num_blocks: int, blocks: int, num_multiprocessors: int) -> int:
    """Warps of a block: eight, or four where a second wave of large blocks would be short."""
    resident = num_multiprocessors * blocks
    return 4 if resident < num_blocks <= 3 * resident else 8


def choose_pairs(num_pairs: int, num_tiles: int, num_multiprocessors: int) -> int:
    """Pairs that share the rows they read, in a block of the widest tile: the most that leave no GPU idle.

    Such a block has a multiprocessor to itself, for as long as it has pairs.
    """

    def time(pairs: int) -> int:
        return pairs * -(-(-(-num_pairs // pairs) * num_tiles) // num_multiprocessors)

    quickest = min(map(time, _SHARING_PAIRS))
    return max(pairs for pairs in _SHARING_PAIRS if time(pairs) <= 1.05 * quickest)


def variants(bits: Bits) -> list[Variant]:
    """Every kernel that these ops may ask for with weights of that many bits."""
    kinds = (_GATED, _WEIGHTED) if bits == 2 else (_PLAIN, _GATED, _WEIGHTED)
    shapes = [(*shape, 1) for shape in product(_TOKEN_TILES[:-1], kinds, (4, 8))]
    shapes += product(_TOKEN_TILES[-1:], kinds, (8,), _SHARING_PAIRS)
    streaming = [_variant(bits, *shape) for shape in shapes]
    if bits == 2:
        return streaming  # dense layers never have it
    untile = [] if bits == 16 else [Variant("untile", (("BITS", bits),))]
    return streaming + batch_linear_variants(bits) + untile


def _variant(bits: Bits, token_tiles: int, kind: int, warps: int, pairs: int) -> Variant:
    stages, blocks = stages_and_blocks(bits, token_tiles)
    defines = {"BITS": bits, "TOKEN_TILES": token_tiles, "OUTPUT": kind, "STAGES": stages}
    defines |= {"WARPS": warps, "WARPS_N": pairs, "BLOCKS": blocks * 8 // warps}
    return Variant("tiled_linear", tuple(defines.items()))


def _launch(
    device: Device,
    weight: TiledWeight,
    kind: int,
    token_tiles: int,
    num_tiles: int,
    x: Tensor,
    rows: list[Argument],
    y: Tensor,
    expert_weights: Tensor | None,
) -> None:
    arguments: list[Argument] = [weight.tiles, weight.scales, weight.num_pairs, weight.num_chunks]
    arguments += [x, weight.num_inputs, *rows, y, expert_weights, weight.num_features]
    if token_tiles == _TOKEN_TILES[-1]:
        warps, pairs = 8, choose_pairs(weight.num_pairs, num_tiles, device.num_multiprocessors)
    else:
        _, blocks = stages_and_blocks(weight.bits, token_tiles)
        warps, pairs = choose_warps(weight.num_pairs * num_tiles, blocks, device.num_multiprocessors), 1
    grid = -(-weight.num_pairs // pairs), num_tiles
    shared_bytes = warps * 8 * token_tiles * _SUMS_STRIDE * 4
    variant = _variant(weight.bits, token_tiles, kind, warps, pairs)
    device.launch(variant, "tiled_linear", grid, 32 * warps, shared_bytes, arguments, overlaps=True)

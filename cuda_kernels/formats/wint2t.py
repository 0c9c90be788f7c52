"""WINT2T (trellis, 2.0625 bit): one convolutional code runs along the whole column; scales as in WINT2."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats import trellis
from cuda_kernels.formats.encoder import Effort, damp
from cuda_kernels.formats.feedback import feedback_couplings
from cuda_kernels.formats.layout import (
    GROUP_SIZE,
    ROW_MULTIPLE,
    FormatError,
    ScaleRounding,
    check,
    check_rows,
    check_weight,
    product_dtype,
)
from cuda_kernels.formats.scales import MAX_LOCAL, Scales, refit_step, snap

#      byte r-2   byte r-1   byte r          symbols of rows 4r .. 4r+3, the first in the high bits;
#     |xxxxxxxx| |xxxxxxxx| |aabbccdd|       bytes before the first are zero
#        '------ state of 4r -'              level = byte sum of (state·A + B) mod 2^32, minus 510
#          '------ state of 4r+1 -'
#            '------ state of 4r+2 -'
#              '------ state of 4r+3 -'
_SHIFTS = (6, 4, 2, 0)

# Rows that are fixed at a time, without a Hessian and with one, which wants errors pushed on soon; and rows
# beyond that take part in the search, for paths grow together only some four states' lengths back.
_PLAIN_BLOCK = 256
_FEEDBACK_BLOCK: dict[Effort, int] = {"fast": 64, "normal": 32, "best": 16}
_LOOKAHEAD = 32
_PASSES: dict[Effort, int] = {"fast": 1, "normal": 1, "best": 2}


@dataclass(frozen=True, eq=False)
class Wint2tWeight:
    """One projection [K, N] as stored, rows in true order."""

    quant_weight: Tensor  # uint8 [K/4, N]
    weight_scale: Tensor  # uint8 [K/128, N]: local scales of two 64-groups, even group in the high nibble
    super_scales: Tensor  # bf16 [N]

    @property
    def shape(self) -> tuple[int, int]:
        return 4 * self.quant_weight.shape[0], self.quant_weight.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under their names in a checkpoint."""
        return dict(self.__dict__)


def quantize(weight: Tensor, *, hessian: Tensor | None = None, effort: Effort = "normal") -> Wint2tWeight:
    """The encoding of `weight` [K, N], K a multiple of 128, for inputs of second moment `hessian` [K, K]."""
    check_weight(weight, ROW_MULTIPLE)
    if effort not in _PASSES:
        raise FormatError(f"effort: expected one of {', '.join(_PASSES)}, got {effort!r}")
    rows = weight.float()
    if hessian is not None:
        check("hessian", hessian, (rows.shape[0], rows.shape[0]), hessian.dtype)
    search = _Search(rows, hessian, _PLAIN_BLOCK if hessian is None else _FEEDBACK_BLOCK[effort])
    groups = rows.view(-1, GROUP_SIZE, rows.shape[1])
    scales = snap(groups.square().mean(dim=1).sqrt() / trellis.DEVIATION, torch.ones_like(groups[:, 0]))
    symbols, levels = search.run(scales)
    for _ in range(1, _PASSES[effort] if hessian is None else 1):
        scales = _refit(groups, levels, scales)
        symbols, levels = search.run(scales)
    dot, norm = _products(groups, levels)
    return pack(symbols, scales.local.to(torch.uint8), refit_step(scales, dot, norm))


def pack(symbols: Tensor, local_scales: Tensor, super_scales: Tensor) -> Wint2tWeight:
    """Symbols 0..3 [K, N] and local scales 0..15 [K/64, N] to the stored tensors."""
    check("local_scales", local_scales, (symbols.shape[0] // GROUP_SIZE, symbols.shape[1]), torch.uint8)
    quads = symbols.to(torch.uint8).view(-1, 4, symbols.shape[1])
    packed = quads[:, 0] << 6 | quads[:, 1] << 4 | quads[:, 2] << 2 | quads[:, 3]
    nibbles = local_scales.view(-1, 2, local_scales.shape[1])
    return Wint2tWeight(packed, nibbles[:, 0] << 4 | nibbles[:, 1], super_scales.to(torch.bfloat16))


def unpack(weight: Wint2tWeight) -> tuple[Tensor, Tensor]:
    """The integer levels, int16 [K, N], and the local scales, uint8 [K/64, N]."""
    packed = torch.nn.functional.pad(weight.quant_weight.int(), (0, 0, 2, 0))
    windows = packed[:-2] << 16 | packed[1:-1] << 8 | packed[2:]
    states = torch.stack([(windows >> shift) & (trellis.NUM_STATES - 1) for shift in _SHIFTS], dim=1)
    high, low = weight.weight_scale >> 4, weight.weight_scale & 15
    levels = trellis.level(states.flatten(0, 1)).to(torch.int16)
    return levels, torch.stack([high, low], dim=1).flatten(0, 1)


def dequantize(
    quant_weight: Tensor,
    weight_scale: Tensor,
    super_scales: Tensor,
    *,
    scale_rounding: ScaleRounding = "bf16",
) -> Tensor:
    """The weights, bf16 [K, N]; `scale_rounding` as in WINT2."""
    weight = Wint2tWeight(quant_weight, weight_scale, super_scales)
    _check_tensors(weight)
    levels, local = unpack(weight)
    dtype = product_dtype(scale_rounding)
    scale = (local.to(dtype) * super_scales.to(dtype)).float()  # levels have ten bits: their product is fp32
    groups = levels.view(-1, GROUP_SIZE, levels.shape[1]).float()
    return (groups * scale.unsqueeze(1)).flatten(0, 1).to(torch.bfloat16)


class _Search:
    """Encodes rows [K, N] block after block; a Hessian pushes each block's error into those after it."""

    def __init__(self, rows: Tensor, hessian: Tensor | None, block: int) -> None:
        self._rows = rows
        self._block = block
        self._weights = torch.ones(rows.shape[0], device=rows.device)
        self._coupling: Tensor | None = None
        if hessian is not None:
            couplings = feedback_couplings(damp(hessian.float()), self._block)
            self._coupling = couplings.matrix
            self._weights = couplings.metric.factors.square().sum(dim=1).flatten()

    def run(self, scales: Scales) -> tuple[Tensor, Tensor]:
        """Symbols uint8 [K, N] and levels f32 [G, 64, N]."""
        rows, errors, levels = self._rows, torch.zeros_like(self._rows), torch.empty_like(self._rows)
        scale = scales.values.repeat_interleave(GROUP_SIZE, dim=0)
        state = torch.zeros(rows.shape[1], dtype=torch.int64, device=rows.device)
        symbols = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
        for start in range(0, rows.shape[0], self._block):
            block, ahead = slice(start, start + self._block), slice(start, start + self._block + _LOOKAHEAD)
            targets = rows[ahead]
            if self._coupling is not None:
                targets = targets + self._coupling[ahead, :start] @ errors[:start]
            symbols[block] = self._find(targets, ahead, scale[ahead], state)
            visited = trellis.states(symbols[block], state)
            state, levels[block] = visited[-1], trellis.levels(rows.device)[visited]
            errors[block] = targets[: self._block] - levels[block] * scale[block]
        return symbols, levels.view(-1, GROUP_SIZE, rows.shape[1])

    def _find(self, targets: Tensor, ahead: slice, scale: Tensor, state: Tensor) -> Tensor:
        """The symbols of the first block of `targets`."""
        weights = self._weights[ahead] / self._weights[ahead].mean()
        units = targets / torch.where(scale == 0, torch.inf, scale)
        return trellis.viterbi(units, weights, state)[: self._block]


def _refit(groups: Tensor, levels: Tensor, scales: Scales) -> Scales:
    """Local scales by least squares, then the step around them."""
    dot, norm = _products(groups, levels)
    ideal = dot / norm.clamp(min=1e-30) / torch.where(scales.step == 0, 1.0, scales.step)
    local = ideal.round().clamp(0, MAX_LOCAL)
    return Scales(local, refit_step(Scales(local, scales.step), dot, norm))


def _products(groups: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """<w, level> and <level, level> of each group, f32 [G, N]."""
    return (groups * levels).sum(dim=1), levels.square().sum(dim=1)


def _check_tensors(weight: Wint2tWeight) -> None:
    if weight.quant_weight.ndim != 2:
        raise FormatError(f"quant_weight: expected uint8 [K/4, N], got {list(weight.quant_weight.shape)}")
    rows, columns = weight.shape
    check_rows("quant_weight", rows, ROW_MULTIPLE)
    check("quant_weight", weight.quant_weight, (rows // 4, columns), torch.uint8)
    check("weight_scale", weight.weight_scale, (rows // ROW_MULTIPLE, columns), torch.uint8)
    check("super_scales", weight.super_scales, (columns,), torch.bfloat16)

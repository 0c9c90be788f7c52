"""WINT2 (CCQ 2.0625 bit): a byte is four weights; a 4-bit scale per 64 rows times a bf16 scale per column."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats import ccq
from cuda_kernels.formats.encoder import Effort, encode
from cuda_kernels.formats.layout import (
    GROUP_SIZE,
    ROW_MULTIPLE,
    FormatError,
    KOrder,
    ScaleRounding,
    check,
    check_rows,
    check_weight,
    product_dtype,
    slot_rows,
    to_rows,
    to_slots,
)


@dataclass(frozen=True, eq=False)
class Wint2Weight:
    """One projection [K, N] as stored; docs/formats.md draws it."""

    quant_weight: Tensor  # uint8 [K/4, N]: four slots a byte
    weight_scale: Tensor  # uint8 [K/128, N]: local scales of two 64-groups, even group in the high nibble
    super_scales: Tensor  # bf16 [N]
    code_scale: Tensor  # f32 [N]
    code_zp: Tensor  # f32 [N]

    @property
    def shape(self) -> tuple[int, int]:
        return 4 * self.quant_weight.shape[0], self.quant_weight.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The five tensors under their names in a checkpoint."""
        return dict(self.__dict__)


def quantize(
    weight: Tensor,
    *,
    hessian: Tensor | None = None,
    k_order: KOrder = "shuffled",
    effort: Effort = "normal",
) -> Wint2Weight:
    """The WINT2 encoding of `weight` [K, N], K a multiple of 128, with least error for inputs of second
    moment `hessian`.

    `hessian` [K, K] is the sum (or mean) of x xᵀ over calibration inputs x, in true row order; without it
    every row counts alike. `effort` trades time for error: see docs/formats.md.
    """
    check_weight(weight, ROW_MULTIPLE)
    rows = slot_rows(weight.shape[0], k_order).to(weight.device)
    if hessian is not None:
        check("hessian", hessian, (weight.shape[0], weight.shape[0]), hessian.dtype)
        hessian = hessian[rows][:, rows].float()
    found = encode(to_slots(weight.float(), k_order), hessian, effort)
    return pack(found.codes, found.local_scales, found.super_scales, found.code_scale, found.code_zp)


def pack(
    codes: Tensor, local_scales: Tensor, super_scales: Tensor, code_scale: Tensor, code_zp: Tensor
) -> Wint2Weight:
    """Bytes [K/4, N] and local scales 0..15 [K/64, N] to the stored tensors."""
    check("local_scales", local_scales, (codes.shape[0] // 16, codes.shape[1]), torch.uint8)
    nibbles = local_scales.view(-1, 2, local_scales.shape[1])
    return Wint2Weight(
        codes, nibbles[:, 0] << 4 | nibbles[:, 1], super_scales.to(torch.bfloat16), code_scale, code_zp
    )


def unpack(weight: Wint2Weight, *, k_order: KOrder = "shuffled") -> tuple[Tensor, Tensor]:
    """The integer levels, int8 [K, N] in true row order, and the local scales, uint8 [K/64, N]."""
    points = ccq.code_points(weight.code_scale, weight.code_zp)
    codes = points.gather(0, weight.quant_weight.long())
    high, low = weight.weight_scale >> 4, weight.weight_scale & 15
    return to_rows(ccq.fields(codes), k_order), torch.stack([high, low], dim=1).flatten(0, 1)


def dequantize(
    quant_weight: Tensor,
    weight_scale: Tensor,
    super_scales: Tensor,
    code_scale: Tensor,
    code_zp: Tensor,
    *,
    k_order: KOrder = "shuffled",
    scale_rounding: ScaleRounding = "bf16",
) -> Tensor:
    """The weights, bf16 [K, N] in true row order.

    `scale_rounding` is where the product local·super is rounded: to "bf16" before it meets the level
    (FastDeploy from 2.1 on), or not at all ("fp32", FastDeploy 2.0).
    """
    weight = Wint2Weight(quant_weight, weight_scale, super_scales, code_scale, code_zp)
    _check_tensors(weight)
    levels, local = unpack(weight, k_order=k_order)
    dtype = product_dtype(scale_rounding)
    scale = local.to(dtype) * super_scales.to(dtype)
    groups = levels.view(-1, GROUP_SIZE, levels.shape[1]).to(dtype)
    return (groups * scale.unsqueeze(1)).flatten(0, 1).to(torch.bfloat16)


def _check_tensors(weight: Wint2Weight) -> None:
    if weight.quant_weight.ndim != 2:
        raise FormatError(f"quant_weight: expected uint8 [K/4, N], got {list(weight.quant_weight.shape)}")
    rows, columns = weight.shape
    check_rows("quant_weight", rows, ROW_MULTIPLE)
    check("quant_weight", weight.quant_weight, (rows // 4, columns), torch.uint8)
    check("weight_scale", weight.weight_scale, (rows // ROW_MULTIPLE, columns), torch.uint8)
    check("super_scales", weight.super_scales, (columns,), torch.bfloat16)
    check("code_scale", weight.code_scale, (columns,), torch.float32)
    check("code_zp", weight.code_zp, (columns,), torch.float32)

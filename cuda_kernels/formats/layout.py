"""What the formats share: the order of rows inside a 64-group, padding, and shape checks that name the
sizes."""

from typing import Literal

import torch
from torch import Tensor

KOrder = Literal["shuffled", "natural"]
ScaleRounding = Literal["bf16", "fp32"]

GROUP_SIZE = 64  # rows that share one local scale
ROW_MULTIPLE = 128  # two groups share one byte of local scales


class FormatError(ValueError):
    """A tensor has a shape, dtype or value that the format cannot hold; the message names it and the
    sizes."""


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise FormatError unless `tensor` is exactly `dtype` and `shape`."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(f"{name}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def check_rows(name: str, rows: int, multiple: int) -> None:
    """Raise FormatError unless `rows` is a positive multiple of `multiple`."""
    if rows <= 0 or rows % multiple:
        raise FormatError(f"{name}: {rows} rows, need a positive multiple of {multiple} (pad with zero rows)")


def check_weight(weight: Tensor, multiple: int) -> None:
    """Raise FormatError unless `weight` is a finite floating [K, N] with K a multiple of `multiple`."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise FormatError(f"weight: expected a floating [K, N], got {weight.dtype} {list(weight.shape)}")
    check_rows("weight", weight.shape[0], multiple)
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise FormatError(f"weight: {bad} of {weight.numel()} values are NaN or infinite")


def pad_rows(weight: Tensor, multiple: int = ROW_MULTIPLE) -> Tensor:
    """`weight` [K, N] with zero rows appended up to the next multiple; the true K is the caller's to keep."""
    missing = -weight.shape[0] % multiple
    return torch.nn.functional.pad(weight, (0, 0, 0, missing)) if missing else weight


def product_dtype(scale_rounding: ScaleRounding) -> torch.dtype:
    """Where the product local·super is rounded."""
    if scale_rounding not in ("bf16", "fp32"):
        raise FormatError(f"scale_rounding: expected 'bf16' or 'fp32', got {scale_rounding!r}")
    return torch.bfloat16 if scale_rounding == "bf16" else torch.float32


# A slot is a position along K as stored. In a SHUFFLED file slot 16a+2b+c of a 64-group holds row 8b+2a+c
# (a<4, b<8, c<2), the order in which one lane of mma.m16n8k16 needs the four weights of a byte:
#
#     slot   0 1 2 3   4  5  6  7 ... 16 17 ...
#     row    0 1 8 9  16 17 24 25 ...  2  3 ...


def to_slots(rows: Tensor, k_order: KOrder) -> Tensor:
    """Rows [K, N] in true order to the order of the file."""
    return _exchange(rows, k_order, inner=(8, 4))


def to_rows(slots: Tensor, k_order: KOrder) -> Tensor:
    """Slots [K, N] in the file's order to true order."""
    return _exchange(slots, k_order, inner=(4, 8))


def slot_rows(num_rows: int, k_order: KOrder) -> Tensor:
    """The true row of every slot, int64 [K]."""
    return to_slots(torch.arange(num_rows).unsqueeze(1), k_order).squeeze(1)


def _exchange(tensor: Tensor, k_order: KOrder, inner: tuple[int, int]) -> Tensor:
    if k_order == "natural":
        return tensor
    if k_order != "shuffled":
        raise FormatError(f"k_order: expected 'shuffled' or 'natural', got {k_order!r}")
    rows, columns = tensor.shape
    check_rows("weight", rows, GROUP_SIZE)
    return tensor.view(-1, *inner, 2, columns).transpose(1, 2).reshape(rows, columns)

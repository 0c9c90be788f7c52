"""Op `linear`: y = x · Wᵀ with a dense weight, and the form in which each device multiplies it fastest.

Shapes: T rows, K input features, N output features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cuda_kernels.compiled import cpu
from cuda_kernels.cpu.panels import PanelWeight
from cuda_kernels.tiled import TiledWeight
from cuda_kernels.tiled_linear import tiled_linear

# oneDNN lays a weight out for the row count it is told; 64 is within 5% of the best from 1 row to 1024.
_PACK_ROWS = 64
# oneDNN's and MKL's kernels give a row the same bits beside any other rows, except below these counts.
_MIN_ROWS_ONEDNN = 2
_MIN_ROWS_MKL = 4


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A weight [N, K] in its device's form: packed by oneDNN on a CPU that has it, plain elsewhere."""

    data: torch.Tensor
    num_outputs: int
    num_inputs: int
    dtype: torch.dtype
    is_packed: bool

    @property
    def nbytes(self) -> int:
        return self.num_outputs * self.num_inputs * self.dtype.itemsize


def pack_dense(weight_NK: torch.Tensor) -> DenseWeight:
    """Lay a weight [N, K] out for `linear`; the result owns its memory on a CPU, shares it on a GPU."""
    is_packed = _can_pack(weight_NK)
    data = weight_NK.contiguous()
    if is_packed:
        data = torch.ops.mkldnn._reorder_linear_weight(data, _PACK_ROWS)
    return DenseWeight(data, weight_NK.shape[0], weight_NK.shape[1], weight_NK.dtype, is_packed)


def linear(x_TK: torch.Tensor, weight: DenseWeight | TiledWeight | PanelWeight) -> torch.Tensor:
    """x [T, K] times a weight [N, K], transposed: [T, N] in x's dtype; of a gated one SwiGLU, [T, N/2].

    On a CPU in float32 a row's result has the same bits whatever the other rows are.
    """
    if x_TK.shape[-1] != weight.num_inputs:
        raise ValueError(f"linear: x has {x_TK.shape[-1]} features, the weight takes {weight.num_inputs}")
    if isinstance(weight, TiledWeight):
        return tiled_linear(x_TK, weight)
    if isinstance(weight, PanelWeight):
        return cpu.linear(x_TK, weight)
    if x_TK.is_cuda:
        return F.linear(x_TK, weight.data)
    return _linear_cpu(x_TK, weight)


def _linear_cpu(x_TK: torch.Tensor, weight: DenseWeight) -> torch.Tensor:
    num_rows = x_TK.shape[0]
    if num_rows == 0:
        return x_TK.new_empty(0, weight.num_outputs)
    if weight.is_packed:
        x_TK = _pad_rows(x_TK, max(num_rows, _MIN_ROWS_ONEDNN))
        y_TN: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_TK, weight.data, None, "none", [], "")
    else:
        x_TK = _pad_rows(x_TK, -(-num_rows // _MIN_ROWS_MKL) * _MIN_ROWS_MKL)
        y_TN = F.linear(x_TK, weight.data)
    return y_TN[:num_rows]


def _pad_rows(x_TK: torch.Tensor, num_rows: int) -> torch.Tensor:
    missing = num_rows - x_TK.shape[0]
    return F.pad(x_TK, (0, 0, 0, missing)) if missing else x_TK.contiguous()


def _can_pack(weight_NK: torch.Tensor) -> bool:
    if weight_NK.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight_NK.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight_NK.dtype == torch.float32

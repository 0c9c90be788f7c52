"""Quantizes one projection and measures what that cost."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats import wint2, wint2t, wint4, wint8
from cuda_kernels.formats.encoder import Effort
from cuda_kernels.formats.layout import ROW_MULTIPLE, pad_rows
from gpu_worker.model.checkpoint_writer import QuantizedWeight, plain_tensor, stored_tensors

_PADDLE_ROWS = 64


@dataclass(frozen=True, eq=False)
class Projection:
    """A quantized projection: what is stored, what it computes with, and its error."""

    name: str
    format: str
    tensors: dict[str, Tensor]  # by their names in the file
    weight: Tensor  # f32 [K, N] as decoded, true rows only
    weight_error: float  # |W - Ŵ|² / |W|²
    output_error: float | None  # |x(W - Ŵ)|² / |xW|² over calibration rows, when their moments were given

    def figures(self) -> dict[str, object]:
        """What the report says of it."""
        return {
            "name": self.name,
            "format": self.format,
            "num_weights": self.weight.numel(),
            "num_bytes": sum(t.numel() * t.element_size() for t in self.tensors.values()),
            "weight_error": self.weight_error,
            "output_error": self.output_error,
        }


def quantize_projection(
    name: str, weight: Tensor, format: str, effort: Effort, moment: Tensor | None = None
) -> Projection:
    """`weight` f32 [K, N] in `format`, a weight format's name or "none"; `moment` [K, K] is Σ x xᵀ of
    its inputs."""
    tensors, decoded = _quantize(name, weight, format, effort, moment)
    decoded = decoded[: weight.shape[0]].float()
    error = weight - decoded
    return Projection(
        name,
        format,
        tensors,
        decoded,
        _ratio(error.square().sum(), weight.square().sum()),
        None if moment is None else _ratio(_energy(error, moment), _energy(weight, moment)),
    )


def _quantize(
    name: str, weight: Tensor, format: str, effort: Effort, moment: Tensor | None
) -> tuple[dict[str, Tensor], Tensor]:
    if format == "none":
        plain = plain_tensor(weight)
        return {f"ernie.{name}.weight": plain}, plain
    stored, decoded = _encode(weight, format, effort, moment)
    return stored_tensors(name, stored), decoded


def _encode(
    weight: Tensor, format: str, effort: Effort, moment: Tensor | None
) -> tuple[QuantizedWeight, Tensor]:
    if format == "wint2":
        padded = pad_rows(weight, ROW_MULTIPLE)
        found = wint2.quantize(padded, hessian=_pad_moment(moment, padded.shape[0]), effort=effort)
        return found, wint2.dequantize(*found.tensors().values())
    if format == "wint2t":
        padded = pad_rows(weight, ROW_MULTIPLE)
        path = wint2t.quantize(padded, hessian=_pad_moment(moment, padded.shape[0]), effort=effort)
        return path, wint2t.dequantize(*path.tensors().values())
    padded = pad_rows(weight, _PADDLE_ROWS)
    if format == "wint4":
        low = wint4.quantize(padded, hessian=_pad_moment(moment, padded.shape[0]))
        return low, wint4.dequantize(low.quant_weight, low.weight_scale)
    high = wint8.quantize(padded)
    return high, wint8.dequantize(high.quant_weight, high.weight_scale)


def _pad_moment(moment: Tensor | None, rows: int) -> Tensor | None:
    if moment is None or moment.shape[0] == rows:
        return moment
    missing = rows - moment.shape[0]
    return torch.nn.functional.pad(moment, (0, missing, 0, missing))


def _energy(weight: Tensor, moment: Tensor) -> Tensor:
    return (weight * (moment @ weight)).sum()


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if float(whole) > 0 else 0.0

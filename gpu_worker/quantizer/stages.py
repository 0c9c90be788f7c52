"""What each stage of the encoder gains, seen on some columns of one expert of a layer.

Every stage's weight Ŵ is judged by |y - x·Ŵ|² / |y|² over the expert's calibration rows, y being what the
original wants of the projection there: its own output for up_gate, the residual stream's deficit for down.
Shapes: R rows, K inputs, C columns.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from torch import Tensor

from cuda_kernels.formats.encoder import Effort, rounded
from cuda_kernels.formats.layout import ROW_MULTIPLE, pad_rows
from gpu_worker.quantizer.projection import quantize_projection
from gpu_worker.quantizer.recipe import ExpertFormat

COLUMNS = 32  # as many as show a mean, too few to cost time

ROUNDED = "rounded to nearest"
SEARCHED = "codes and scales searched"
FED_BACK = "errors fed back"
DESCENDED = "coordinate descent"
FITTED = "fitted to the original's stream"
NAMES = (ROUNDED, SEARCHED, FED_BACK, DESCENDED, FITTED)


@dataclass(frozen=True, eq=False)
class Sample:
    """Some columns of a projection, and what they are for."""

    x_RK: Tensor
    wanted_RC: Tensor
    weight_KC: Tensor
    fitted_KC: Tensor  # moved to make up for what is lacking, before it is rounded
    moment_KK: Tensor  # Σ x xᵀ

    def lost(self, weight_KC: Tensor) -> float:
        """|y - x·Ŵ|² / |y|²."""
        wanted = float(self.wanted_RC.square().sum())
        return float((self.wanted_RC - self.x_RK @ weight_KC).square().sum()) / wanted if wanted else 0.0


def columns(weight_KN: Tensor) -> Tensor:
    """Those of a projection that are looked at."""
    return weight_KN[..., :: max(1, weight_KN.shape[-1] // COLUMNS)][..., :COLUMNS].contiguous()


def measure(sample: Sample, format: ExpertFormat, effort: Effort) -> dict[str, float]:
    """The loss after each stage that the format and effort have."""

    def loss(weight_KC: Tensor, moment_KK: Tensor | None, with_effort: Effort) -> float:
        return sample.lost(quantize_projection("", weight_KC, format, with_effort, moment_KK).weight)

    plain, moment = sample.weight_KC, sample.moment_KK
    found = {}
    if format == "wint2":
        found[ROUNDED] = sample.lost(rounded(pad_rows(plain, ROW_MULTIPLE))[: len(plain)])
    found[ROUNDED if format == "wint4" else SEARCHED] = loss(plain, None, effort)
    found[FED_BACK] = loss(plain, moment, "fast")
    if format == "wint2" and effort != "fast":
        found[DESCENDED] = loss(plain, moment, effort)
    if sample.fitted_KC is not plain:
        found[FITTED] = loss(sample.fitted_KC, moment, effort)
    return found


class Left(NamedTuple):
    """What a stage left, the mean of the layers with experts of a format."""

    format: str
    stage: str
    up_gate: float
    down: float


class Fit(NamedTuple):
    """The residual stream's error behind a projection as it was and as fitted, the mean of the layers."""

    name: str
    without: float
    fitted: float


def table(layers: Iterable[dict[str, Any]]) -> list[Left]:
    """The report's layers, gathered by format and stage."""
    left: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for layer in layers:
        format = next((p["format"] for p in layer["projections"] if ".experts." in p["name"]), "")
        up_gate, down = (layer["stages"].get(part, {}) for part in ("up_gate", "down"))
        for stage, value in up_gate.items():
            left[format, stage].append((value, down[stage]))
    order = sorted(left, key=lambda place: (place[0], NAMES.index(place[1])))
    return [Left(*place, *_means(left[place])) for place in order]


def fits(layers: Iterable[dict[str, Any]]) -> list[Fit]:
    """The report's layers, gathered by projection into the residual stream."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for layer in layers:
        for name, (without, fitted) in layer["fits"].items():
            found[name].append((without, fitted))
    return [Fit(name, *_means(errors)) for name, errors in found.items()]


def _means(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*pairs, strict=True)
    return fmean(first), fmean(second)

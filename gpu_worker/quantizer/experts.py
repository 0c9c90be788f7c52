"""Quantizes a layer's routed experts one after another, each making up for what is lacking so far."""

from dataclasses import dataclass

from torch import Tensor

from gpu_worker.model.plan import MoEPlan
from gpu_worker.quantizer import correction, forward
from gpu_worker.quantizer.layer import Balance, LayerResult
from gpu_worker.quantizer.projection import quantize_projection
from gpu_worker.quantizer.recipe import ExpertFormat, Recipe
from gpu_worker.quantizer.source import Source
from gpu_worker.quantizer.stages import Sample, columns, measure


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the experts read, [R, D], and which of them each row goes to, in both models."""

    x_RD: Tensor
    original_RD: Tensor
    routing: forward.Routing
    original_routing: forward.Routing


@dataclass(frozen=True, eq=False)
class Moments:
    """What calibration knows of the inputs of an up_gate projection."""

    moment: Tensor  # Σ x xᵀ [D, D]
    see_through: Tensor | None  # how a weight sees through the drift of x, [D, D]


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows one expert is calibrated on."""

    index: Tensor
    weights: Tensor  # [R, 1] how much an error counts
    routed: Tensor  # [R, 1] the routing weight; zero for a lent row
    is_fair: Tensor  # [R, 1] the original sends the row here too: its deficit is this expert's to fill


@dataclass(frozen=True, eq=False)
class ExpertQuantizer:
    """Quantizes the experts of one layer."""

    source: Source
    recipe: Recipe
    name: str  # what their tensors' names begin with
    format: ExpertFormat
    inputs: Inputs
    balance: Balance
    result: LayerResult

    def run(self, plan: MoEPlan) -> None:
        """All experts, one in memory at a time."""
        inputs = self.inputs
        shared = self._moments(inputs.x_RD, inputs.original_RD) if inputs.routing.is_full else None
        for expert, mlp in enumerate(plan.experts):
            up_gate, down = self.source.linear(mlp.up_gate), self.source.linear(mlp.down)
            self._owe(expert, up_gate, down)
            rows = self._rows(expert)
            self.result.rows_per_expert.append(int((rows.routed > 0).sum()))
            moments = self._expert_moments(rows) if shared is None else shared
            self._quantize(f"{self.name}.{expert}", (up_gate, down), rows, moments)

    def _owe(self, expert: int, up_gate: Tensor, down: Tensor) -> None:
        """What the original's expert adds to the stream."""
        routed = self.inputs.original_routing.weights_RE[:, expert]
        index = routed.nonzero().squeeze(1)
        value = forward.swiglu(self.inputs.original_RD[index], up_gate) @ down
        self.balance.owe(value * routed[index].unsqueeze(1), index)

    def _rows(self, expert: int) -> Rows:
        routing, original = self.inputs.routing, self.inputs.original_routing
        index, weights = routing.rows(expert, self.recipe.min_rows)
        routed = routing.weights_RE[index, expert]
        is_fair = (routed > 0) & (original.weights_RE[index, expert] > 0)
        return Rows(index, weights.unsqueeze(1), routed.unsqueeze(1), is_fair.unsqueeze(1))

    def _expert_moments(self, rows: Rows) -> Moments:
        inputs = self.inputs
        x_RD, original_RD = inputs.x_RD[rows.index], inputs.original_RD[rows.index]
        return self._moments(x_RD * rows.weights, original_RD * rows.weights)

    def _moments(self, x_RD: Tensor, original_RD: Tensor) -> Moments:
        moment = correction.moment(x_RD)
        if not self.recipe.correct_experts:
            return Moments(moment, None)
        return Moments(moment, correction.fit(moment, x_RD, original_RD - x_RD))

    def _quantize(self, name: str, weights: tuple[Tensor, Tensor], rows: Rows, moments: Moments) -> None:
        up_gate, fitted = weights[0], weights[0]
        if moments.see_through is not None:
            fitted = up_gate + moments.see_through @ up_gate
        x_RD, original_RD = self.inputs.x_RD[rows.index], self.inputs.original_RD[rows.index]
        self._measure("up_gate", x_RD, original_RD @ columns(up_gate), (up_gate, fitted), moments.moment)
        inner_RF = forward.swiglu(x_RD, self._store(f"{name}.up_gate_proj", fitted, moments.moment))
        weighted_RF, down = inner_RF * rows.weights, weights[1]
        moment, fitted = correction.moment(weighted_RF), down
        if self.recipe.correct_experts:
            short_RD = (self.balance.deficit[rows.index] - weighted_RF @ down) * rows.is_fair
            fitted = down + correction.fit(moment, weighted_RF, short_RD)
        wanted_RC = columns(self.balance.deficit[rows.index] * rows.is_fair)
        self._measure("down", weighted_RF * rows.is_fair, wanted_RC, (down, fitted), moment)
        stored = self._store(f"{name}.down_proj", fitted, moment)
        self.balance.pay(inner_RF @ stored * rows.routed, rows.index)

    def _measure(
        self, part: str, x_RK: Tensor, wanted_RC: Tensor, weights: tuple[Tensor, Tensor], moment: Tensor
    ) -> None:
        """See, of the layer's first expert alone, what each stage of the encoder gains."""
        if part not in self.result.stages:
            plain, fitted = columns(weights[0]), columns(weights[1])
            sample = Sample(x_RK, wanted_RC, plain, plain if weights[0] is weights[1] else fitted, moment)
            self.result.stages[part] = measure(sample, self.format, self.recipe.effort)

    def _store(self, name: str, weight: Tensor, moment: Tensor) -> Tensor:
        return self.result.add(quantize_projection(name, weight, self.format, self.recipe.effort, moment))

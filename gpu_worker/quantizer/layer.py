"""Quantizes one decoder layer on the activations of calibration windows behind the quantized prefix."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from gpu_worker.model.checkpoint_writer import plain_tensor
from gpu_worker.model.plan import MLPPlan, MoEPlan
from gpu_worker.model.stored_weight import StoredLinear, StoredVector
from gpu_worker.quantizer import correction, forward
from gpu_worker.quantizer.projection import Projection, quantize_projection
from gpu_worker.quantizer.recipe import Recipe
from gpu_worker.quantizer.runner import LayerRunner
from gpu_worker.quantizer.source import Source

OnWeights = Callable[[int], None]  # so many weights have been quantized


@dataclass(frozen=True, eq=False)
class Streams:
    """The residual stream over the calibration windows, [S, T, D], of both models."""

    quantized: Tensor
    original: Tensor


@dataclass(eq=False)
class LayerResult:
    """What one layer leaves behind: tensors to store and figures to report."""

    on_weights: OnWeights
    tensors: dict[str, Tensor] = field(default_factory=dict)
    projections: list[dict[str, object]] = field(default_factory=list)
    rows_per_expert: list[int] = field(default_factory=list)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)  # of a projection, what each left over
    fits: dict[str, list[float]] = field(default_factory=dict)  # stream error as it was, and fitted
    stream_error: float = 0.0  # |h - ĥ|² / |h|² of the residual stream behind the layer

    def add(self, projection: Projection) -> Tensor:
        """Keep a projection; returns the weight it computes with."""
        self.tensors |= projection.tensors
        self.projections.append(projection.figures())
        self.on_weights(projection.weight.numel())
        return projection.weight

    def figures(self) -> dict[str, object]:
        """What the report says of the layer."""
        return {
            "stream_error": self.stream_error,
            "rows_per_expert": self.rows_per_expert,
            "stages": self.stages,
            "fits": self.fits,
            "projections": self.projections,
        }


@dataclass(eq=False)
class Balance:
    """How far a layer's two models have come, each [R, D]."""

    original: Tensor  # the original's residual stream, with what has run of the layer
    deficit: Tensor  # what the quantized stream lacks of it

    def owe(self, value: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """The original has added `value` to `rows`."""
        self.original[rows] += value
        self.deficit[rows] += value

    def error(self) -> float:
        """|h - ĥ|² / |h|²."""
        return self.relative(self.deficit)

    def relative(self, lack_RD: Tensor) -> float:
        """The same, were `lack` the deficit."""
        return float(lack_RD.square().sum() / self.original.square().sum())

    def pay(self, value: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """The quantized model has added `value` to `rows`."""
        self.deficit[rows] -= value


class DenseQuantizer:
    """Quantizes what every row passes: attention, dense and shared MLPs."""

    def __init__(self, source: Source, recipe: Recipe) -> None:
        self._source = source
        self._config = source.config
        self._recipe = recipe
        self._runner = LayerRunner(source)

    def attention(self, layer: int, streams: Streams, result: LayerResult) -> tuple[Balance, Tensor, Tensor]:
        """The streams behind the attention; what the MLP reads in the quantized and in the original model."""
        plan = self._source.layer(layer)
        goal = self._runner.attend(layer, streams.original)
        balance = Balance(goal.hidden_RD, goal.hidden_RD - streams.quantized.flatten(0, 1))
        x_STD = self._normed(plan.input_norm, f"layers.{layer}.input_layernorm", streams.quantized, result)
        name = f"layers.{layer}.self_attn"
        qkv = self._store(f"{name}.qkv_proj", self._source.linear(plan.qkv), result)
        extras = self._source.attention_extras(layer)
        result.tensors |= _extra_tensors(f"ernie.{name}", extras)
        mixed_RK = forward.attention(x_STD, qkv, self._config, extras).flatten(0, 1)
        self._project(f"{name}.o_proj", plan.o, mixed_RK, balance, result)
        norm = f"layers.{layer}.post_attention_layernorm"
        x_RD = self._normed(plan.post_attention_norm, norm, balance.original - balance.deficit, result)
        return balance, x_RD, goal.mlp_input_RD

    def mlp(
        self, name: str, plan: MLPPlan, inputs: tuple[Tensor, Tensor], balance: Balance, result: LayerResult
    ) -> None:
        """An MLP that reads (quantized, original) `inputs` and makes up for what is lacking so far."""
        self._mlp(name, plan, inputs, (1.0, 1.0), balance, result)

    def shared(
        self, name: str, moe: MoEPlan, inputs: tuple[Tensor, Tensor], balance: Balance, result: LayerResult
    ) -> None:
        """The shared experts, if the layer has any, with their gate."""
        if moe.shared is not None:
            x_share, original_share = (self._runner.shared_share(moe, x_RD) for x_RD in inputs)
            self._mlp(name, moe.shared, inputs, (x_share, original_share), balance, result)

    def _mlp(
        self,
        name: str,
        plan: MLPPlan,
        inputs: tuple[Tensor, Tensor],
        shares: tuple[Tensor | float, Tensor | float],
        balance: Balance,
        result: LayerResult,
    ) -> None:
        x_RD, original_RD = inputs
        balance.owe(self._runner.mlp(plan, original_RD) * shares[1])
        up_gate = self._store(f"{name}.up_gate_proj", self._source.linear(plan.up_gate), result)
        inner_RF = forward.swiglu(x_RD, up_gate) * shares[0]
        self._project(f"{name}.down_proj", plan.down, inner_RF, balance, result)

    def _project(
        self, name: str, stored: StoredLinear, x_RK: Tensor, balance: Balance, result: LayerResult
    ) -> None:
        """A projection into the residual stream, corrected so that x·W comes nearer to the deficit."""
        weight = self._source.linear(stored)
        if not self._recipe.correct_dense:
            balance.pay(x_RK @ self._store(name, weight, result))
            return
        short_RD = balance.deficit - x_RK @ weight
        without = balance.relative(short_RD)
        weight = weight + correction.fit(correction.moment(x_RK), x_RK, short_RD)
        balance.pay(x_RK @ self._store(name, weight, result))
        result.fits[name.split(".", 2)[2]] = [without, balance.error()]

    def _store(self, name: str, weight: Tensor, result: LayerResult) -> Tensor:
        return result.add(quantize_projection(name, weight, self._recipe.dense, self._recipe.effort))

    def _normed(self, stored: StoredVector, name: str, hidden: Tensor, result: LayerResult) -> Tensor:
        weight = self._source.vector(stored)
        result.tensors[f"ernie.{name}.weight"] = plain_tensor(weight)
        return forward.normed(hidden, weight, self._config)


def _extra_tensors(prefix: str, extras: forward.AttentionExtras) -> dict[str, Tensor]:
    named = {"qkv_proj.bias": extras.qkv_bias, "q_norm.weight": extras.q_norm, "k_norm.weight": extras.k_norm}
    return {f"{prefix}.{name}": plain_tensor(one) for name, one in named.items() if one is not None}

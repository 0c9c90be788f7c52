"""Quantizes one decoder layer on the activations of calibration windows behind the quantized prefix."""

from dataclasses import dataclass, field

from torch import Tensor

from gpu_worker.config import ModelConfig
from gpu_worker.model.checkpoint_writer import plain_tensor
from gpu_worker.quantizer import correction, forward
from gpu_worker.quantizer.projection import Projection, quantize_projection
from gpu_worker.quantizer.recipe import Recipe
from gpu_worker.quantizer.reference import Goal, ReferenceLayers
from gpu_worker.quantizer.source import Source


@dataclass(eq=False)
class LayerResult:
    """What one layer leaves behind: tensors to store and figures to report."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    projections: list[dict[str, object]] = field(default_factory=list)
    rows_per_expert: list[int] = field(default_factory=list)
    stream_error: float = 0.0  # |h - ĥ|² / |h|² of the residual stream behind the layer

    def add(self, projection: Projection) -> Tensor:
        """Keep a projection; returns the weight it computes with."""
        self.tensors |= projection.tensors
        self.projections.append(projection.figures())
        return projection.weight


@dataclass(frozen=True, eq=False)
class Streams:
    """The residual stream over the calibration windows, [S, T, D], of both models."""

    quantized: Tensor
    original: Tensor


class LayerQuantizer:
    """Runs both streams through layer after layer, quantizing each as it goes."""

    def __init__(self, source: Source, config: ModelConfig, recipe: Recipe) -> None:
        self._source = source
        self._config = config
        self._recipe = recipe
        self._original = ReferenceLayers(source, config)

    def quantize(self, layer: int, streams: Streams) -> tuple[LayerResult, Streams]:
        """The quantized layer, and the streams behind it."""
        result = LayerResult()
        goal = self._original.run(layer, streams.original)
        hidden_RD = self._attention(layer, streams.quantized, goal, result)
        x_RD = self._normed(layer, "post_attention_layernorm", hidden_RD, result)
        wanted_RD = goal.hidden_RD - hidden_RD
        if self._config.is_moe_layer(layer):
            out_RD = self._moe(layer, x_RD, goal.mlp_input_RD, wanted_RD, result)
        else:
            out_RD = self._mlp(f"layers.{layer}.mlp", x_RD, wanted_RD, result)
        hidden_RD = hidden_RD + out_RD
        result.stream_error = float(
            (goal.hidden_RD - hidden_RD).square().sum() / goal.hidden_RD.square().sum()
        )
        shape = streams.original.shape
        return result, Streams(hidden_RD.view(shape), goal.hidden_RD.view(shape))

    def _attention(self, layer: int, hidden_STD: Tensor, goal: Goal, result: LayerResult) -> Tensor:
        """The stream behind the attention, [R, D]."""
        x_STD = self._normed(layer, "input_layernorm", hidden_STD, result)
        name = f"layers.{layer}.self_attn"
        qkv = self._dense(f"{name}.qkv_proj", self._source.linear(f"{name}.qkv_proj"), result)
        mixed_RK = forward.attention(x_STD, qkv, self._config).flatten(0, 1)
        hidden_RD = hidden_STD.flatten(0, 1)
        out = self._fitted(f"{name}.o_proj", mixed_RK, goal.attended_RD - hidden_RD)
        return hidden_RD + mixed_RK @ self._dense(f"{name}.o_proj", out, result)

    def _normed(self, layer: int, norm: str, hidden: Tensor, result: LayerResult) -> Tensor:
        name = f"layers.{layer}.{norm}.weight"
        weight = self._source.tensor(name)
        result.tensors[f"ernie.{name}"] = plain_tensor(weight)
        return forward.attention_input(hidden, weight, self._config)

    def _dense(self, name: str, weight: Tensor, result: LayerResult) -> Tensor:
        return result.add(quantize_projection(name, weight, self._recipe.dense, self._recipe.effort))

    def _fitted(self, name: str, x_RK: Tensor, wanted_RN: Tensor) -> Tensor:
        """A dense projection's weight, corrected so that x·W comes nearer to `wanted`."""
        weight = self._source.linear(name)
        if not self._recipe.correct_dense:
            return weight
        return weight + correction.step(correction.moment(x_RK), x_RK, wanted_RN - x_RK @ weight)

    def _mlp(self, prefix: str, x_RD: Tensor, wanted_RD: Tensor, result: LayerResult) -> Tensor:
        up_gate = self._source.linear(f"{prefix}.up_gate_proj")
        inner = forward.swiglu(x_RD, self._dense(f"{prefix}.up_gate_proj", up_gate, result))
        down = self._fitted(f"{prefix}.down_proj", inner, wanted_RD)
        return inner @ self._dense(f"{prefix}.down_proj", down, result)

    def _moe(
        self, layer: int, x_RD: Tensor, original_RD: Tensor, wanted_RD: Tensor, result: LayerResult
    ) -> Tensor:
        """Experts one after another, each making up for what is missing so far, the shared one last."""
        routing = self._route(layer, x_RD, result)
        shared = f"layers.{layer}.mlp.shared_experts"
        missing_RD = wanted_RD - self._original.routed(layer, x_RD, routing)
        plain_shared = self._original.mlp(shared, x_RD) if self._config.num_shared_experts else None
        missing_RD = missing_RD if plain_shared is None else missing_RD - plain_shared
        shared_moment = correction.moment(x_RD) if routing.is_full else None
        for expert in range(self._config.num_experts):
            rows, weights, count = routing.rows(expert, self._recipe.min_rows)
            result.rows_per_expert.append(count)
            task = ExpertTask(
                f"layers.{layer}.mlp.experts.{expert}",
                self._recipe.expert_format(layer),
                x_RD[rows],
                original_RD[rows],
                weights,
                routing.weights_RE[rows, expert],
                shared_moment,
            )
            missing_RD.index_add_(0, rows, self._expert(task, missing_RD[rows], result))
        if plain_shared is not None:
            missing_RD += plain_shared
            missing_RD -= self._mlp(shared, x_RD, missing_RD, result)
        return wanted_RD - missing_RD

    def _expert(self, task: "ExpertTask", missing_RD: Tensor, result: LayerResult) -> Tensor:
        """Quantize one expert; returns by how much its rows now fall short of the original's value."""
        up_gate = self._source.linear(f"{task.name}.up_gate_proj")
        down = self._source.linear(f"{task.name}.down_proj")
        plain_RD = (forward.swiglu(task.x_RD, up_gate) @ down) * task.routed_weights_R.unsqueeze(1)
        inner_RF = forward.swiglu(task.x_RD, self._up_gate(task, up_gate, result))
        scaled_RF = inner_RF * task.weights_R.unsqueeze(1)
        moment = correction.moment(scaled_RF)
        if self._recipe.correct_experts:
            short_RD = plain_RD + missing_RD - scaled_RF @ down
            down = down + correction.step(moment, scaled_RF, short_RD)
        down = result.add(self._encode(f"{task.name}.down_proj", down, task.format, moment))
        return plain_RD - (inner_RF @ down) * task.routed_weights_R.unsqueeze(1)

    def _up_gate(self, task: "ExpertTask", weight: Tensor, result: LayerResult) -> Tensor:
        """The quantized gate and up projection, made to see through the drift of its inputs."""
        moment = correction.moment(task.x_RD, task.weights_R) if task.moment is None else task.moment
        if self._recipe.correct_experts:
            weights = task.weights_R.unsqueeze(1) if task.moment is None else 1
            drift_RD = (task.original_RD - task.x_RD) * weights
            weight = weight + correction.step(moment, task.x_RD * weights, drift_RD @ weight)
        return result.add(self._encode(f"{task.name}.up_gate_proj", weight, task.format, moment))

    def _encode(self, name: str, weight: Tensor, format: str, moment: Tensor) -> Projection:
        return quantize_projection(name, weight, format, self._recipe.effort, moment)

    def _route(self, layer: int, x_RD: Tensor, result: LayerResult) -> forward.Routing:
        prefix = f"ernie.layers.{layer}.mlp"
        result.tensors[f"{prefix}.gate.weight"] = self._source.router(layer)
        result.tensors[f"{prefix}.moe_statics.e_score_correction_bias"] = self._source.correction_bias(layer)
        return self._original.route(layer, x_RD)


@dataclass(frozen=True, eq=False)
class ExpertTask:
    """One expert and the rows it is calibrated on."""

    name: str
    format: str
    x_RD: Tensor
    original_RD: Tensor  # the original model's values of x
    weights_R: Tensor  # how much an error of a row counts
    routed_weights_R: Tensor  # the routing weights; zero for rows that were only lent
    moment: Tensor | None  # Σ x xᵀ when every expert sees every row

"""Quantizes one decoder layer while calibration windows run through it, on activations of the already
quantized prefix."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gpu_worker.config import ModelConfig
from gpu_worker.model.checkpoint_writer import plain_tensor
from gpu_worker.quantizer import forward
from gpu_worker.quantizer.projection import Projection, quantize_projection
from gpu_worker.quantizer.recipe import Recipe
from gpu_worker.quantizer.source import Source


@dataclass(eq=False)
class LayerResult:
    """What one layer leaves behind: tensors to store and figures to report."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    projections: list[dict[str, object]] = field(default_factory=list)
    rows_per_expert: list[int] = field(default_factory=list)

    def add(self, projection: Projection) -> Tensor:
        """Keep a projection; returns the weight it computes with."""
        self.tensors |= projection.tensors
        self.projections.append(
            {
                "name": projection.name,
                "format": projection.format,
                "num_weights": projection.num_weights,
                "num_bytes": projection.num_bytes,
                "weight_error": projection.weight_error,
                "output_error": projection.output_error,
            }
        )
        return projection.weight


class LayerQuantizer:
    """Runs `hidden` [S, T, D] through layer after layer, quantizing each as it goes."""

    def __init__(self, source: Source, config: ModelConfig, recipe: Recipe) -> None:
        self._source = source
        self._config = config
        self._recipe = recipe

    def quantize(self, layer: int, hidden_STD: Tensor) -> tuple[LayerResult, Tensor]:
        """The quantized layer, and the hidden states behind it."""
        result = LayerResult()
        hidden_STD = self._attention(layer, hidden_STD, result)
        x_RD = self._normed(layer, "post_attention_layernorm", hidden_STD, result).flatten(0, 1)
        if self._config.is_moe_layer(layer):
            out_RD = self._moe(layer, x_RD, result)
        else:
            out_RD = self._mlp(f"layers.{layer}.mlp", x_RD, result)
        return result, hidden_STD + out_RD.view_as(hidden_STD)

    def _attention(self, layer: int, hidden_STD: Tensor, result: LayerResult) -> Tensor:
        x_STD = self._normed(layer, "input_layernorm", hidden_STD, result)
        qkv = self._dense(f"layers.{layer}.self_attn.qkv_proj", result)
        mixed = forward.attention(x_STD, qkv, self._config)
        return hidden_STD + mixed @ self._dense(f"layers.{layer}.self_attn.o_proj", result)

    def _normed(self, layer: int, norm: str, hidden_STD: Tensor, result: LayerResult) -> Tensor:
        name = f"layers.{layer}.{norm}.weight"
        weight = self._source.tensor(name)
        result.tensors[f"ernie.{name}"] = plain_tensor(weight)
        return forward.attention_input(hidden_STD, weight, self._config)

    def _dense(self, name: str, result: LayerResult) -> Tensor:
        weight = self._source.linear(name)
        return result.add(quantize_projection(name, weight, self._recipe.dense, self._recipe.effort))

    def _mlp(self, prefix: str, x_RD: Tensor, result: LayerResult) -> Tensor:
        inner = forward.swiglu(x_RD, self._dense(f"{prefix}.up_gate_proj", result))
        return inner @ self._dense(f"{prefix}.down_proj", result)

    def _moe(self, layer: int, x_RD: Tensor, result: LayerResult) -> Tensor:
        prefix = f"layers.{layer}.mlp"
        out_RD = torch.zeros_like(x_RD)
        if self._config.num_shared_experts:
            out_RD += self._mlp(f"{prefix}.shared_experts", x_RD, result)
        routing = self._route(layer, x_RD, result)
        shared_moment = _moment(x_RD, None) if routing.is_full else None
        for expert in range(self._config.num_experts):
            rows, weights, count = routing.rows(expert, self._recipe.min_rows)
            result.rows_per_expert.append(count)
            value = self._expert(layer, expert, x_RD[rows], weights, shared_moment, result)
            out_RD.index_add_(0, rows, value * routing.weights_RE[rows, expert].unsqueeze(1))
        return out_RD

    def _expert(
        self, layer: int, expert: int, x: Tensor, weights: Tensor, moment: Tensor | None, result: LayerResult
    ) -> Tensor:
        """One expert on its rows `x`; an error counts by the square of the routing weight it will meet."""
        prefix = f"layers.{layer}.mlp.experts.{expert}"
        format, effort = self._recipe.expert_format(layer), self._recipe.effort
        moment = _moment(x, weights) if moment is None else moment
        up_gate = self._source.linear(f"{prefix}.up_gate_proj")
        inner = forward.swiglu(
            x, result.add(quantize_projection(f"{prefix}.up_gate_proj", up_gate, format, effort, moment))
        )
        down = self._source.linear(f"{prefix}.down_proj")
        moment = _moment(inner, weights)
        return inner @ result.add(quantize_projection(f"{prefix}.down_proj", down, format, effort, moment))

    def _route(self, layer: int, x_RD: Tensor, result: LayerResult) -> forward.Routing:
        router = self._source.router(layer)
        bias_name = f"layers.{layer}.mlp.moe_statics.e_score_correction_bias"
        bias = self._bias(bias_name, router.shape[1])
        result.tensors[f"ernie.layers.{layer}.mlp.gate.weight"] = router
        result.tensors[f"ernie.{bias_name}"] = bias
        return forward.routing(x_RD, router, bias.flatten(), self._config)

    def _bias(self, name: str, num_experts: int) -> Tensor:
        if name not in self._source:
            return torch.zeros(1, num_experts)
        return self._source.tensor(name).float().reshape(1, num_experts)


def _moment(x: Tensor, weights: Tensor | None) -> Tensor:
    """Σ w² x xᵀ over rows, [K, K]."""
    scaled = x if weights is None else x * weights.unsqueeze(1)
    return scaled.T @ scaled

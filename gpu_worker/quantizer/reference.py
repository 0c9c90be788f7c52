"""One layer of the original model over the calibration windows: the goal the quantized layer is fitted to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_worker.config import ModelConfig
from gpu_worker.quantizer import forward
from gpu_worker.quantizer.source import Source


@dataclass(frozen=True, eq=False)
class Goal:
    """What the original computes in one layer, each [S·T, D]."""

    attended_RD: Tensor  # the residual stream behind the attention
    mlp_input_RD: Tensor  # its normalized value, which the MLP or the experts read
    hidden_RD: Tensor  # the residual stream behind the layer


class ReferenceLayers:
    """Runs the original's layers, one projection in memory at a time."""

    def __init__(self, source: Source, config: ModelConfig) -> None:
        self._source = source
        self._config = config

    def run(self, layer: int, hidden_STD: Tensor) -> Goal:
        """The layer's goal for the windows `hidden`."""
        x_STD = self._norm(layer, "input_layernorm", hidden_STD)
        qkv = self._source.linear(f"layers.{layer}.self_attn.qkv_proj")
        mixed = forward.attention(x_STD, qkv, self._config)
        attended = (hidden_STD + mixed @ self._source.linear(f"layers.{layer}.self_attn.o_proj")).flatten(
            0, 1
        )
        x_RD = self._norm(layer, "post_attention_layernorm", attended)
        if self._config.is_moe_layer(layer):
            out = self.moe(layer, x_RD)
        else:
            out = self.mlp(f"layers.{layer}.mlp", x_RD)
        return Goal(attended, x_RD, attended + out)

    def mlp(self, prefix: str, x: Tensor) -> Tensor:
        """A SwiGLU MLP, [R, D]."""
        inner = forward.swiglu(x, self._source.linear(f"{prefix}.up_gate_proj"))
        return inner @ self._source.linear(f"{prefix}.down_proj")

    def moe(self, layer: int, x_RD: Tensor) -> Tensor:
        """Shared and routed experts together."""
        prefix = f"layers.{layer}.mlp"
        out = torch.zeros_like(x_RD)
        if self._config.num_shared_experts:
            out += self.mlp(f"{prefix}.shared_experts", x_RD)
        return out + self.routed(layer, x_RD, self.route(layer, x_RD))

    def routed(self, layer: int, x_RD: Tensor, routing: forward.Routing) -> Tensor:
        """The routed experts alone, each on the rows that chose it."""
        out = torch.zeros_like(x_RD)
        for expert in range(self._config.num_experts):
            rows = routing.weights_RE[:, expert].nonzero().squeeze(1)
            value = self.mlp(f"layers.{layer}.mlp.experts.{expert}", x_RD[rows])
            out.index_add_(0, rows, value * routing.weights_RE[rows, expert].unsqueeze(1))
        return out

    def route(self, layer: int, x_RD: Tensor) -> forward.Routing:
        """Top-k routing by the original's router, which is never quantized."""
        return forward.routing(
            x_RD, self._source.router(layer), self._source.correction_bias(layer).flatten(), self._config
        )

    def _norm(self, layer: int, norm: str, hidden: Tensor) -> Tensor:
        weight = self._source.tensor(f"layers.{layer}.{norm}.weight")
        return forward.attention_input(hidden, weight, self._config)

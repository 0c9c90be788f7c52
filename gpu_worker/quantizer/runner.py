"""Runs calibration windows through one layer of a checkpoint, a projection in memory at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from gpu_worker.model.plan import MLPPlan, MoEPlan
from gpu_worker.model.stored_weight import StoredVector
from gpu_worker.quantizer import forward
from gpu_worker.quantizer.source import Source


@dataclass(frozen=True, eq=False)
class Attended:
    """A layer after its attention, each [S·T, D]."""

    hidden_RD: Tensor  # the residual stream
    mlp_input_RD: Tensor  # its normalized value, which the MLP or the experts read


class LayerRunner:
    """The layers of one checkpoint, quantized or not."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._config = source.config

    def run(self, layer: int, hidden_STD: Tensor) -> Tensor:
        """The residual stream behind the layer, [S, T, D]."""
        attended = self.attend(layer, hidden_STD)
        hidden_RD, x_RD = attended.hidden_RD.clone(), attended.mlp_input_RD
        mlp = self._source.layer(layer).mlp
        if isinstance(mlp, MLPPlan):
            return (hidden_RD + self.mlp(mlp, x_RD)).view_as(hidden_STD)
        if mlp.shared is not None:
            hidden_RD += self.mlp(mlp.shared, x_RD) * self.shared_share(mlp, x_RD)
        for rows, value in self.routed(mlp, x_RD):
            hidden_RD.index_add_(0, rows, value)
        return hidden_RD.view_as(hidden_STD)

    def attend(self, layer: int, hidden_STD: Tensor) -> Attended:
        """The layer's first half."""
        plan = self._source.layer(layer)
        x_STD = self.norm(plan.input_norm, hidden_STD)
        extras = self._source.attention_extras(layer)
        mixed = forward.attention(x_STD, self._source.linear(plan.qkv), self._config, extras)
        hidden_RD = (hidden_STD + mixed @ self._source.linear(plan.o)).flatten(0, 1)
        return Attended(hidden_RD, self.norm(plan.post_attention_norm, hidden_RD))

    def norm(self, stored: StoredVector, hidden: Tensor) -> Tensor:
        return forward.normed(hidden, self._source.vector(stored), self._config)

    def mlp(self, plan: MLPPlan, x: Tensor) -> Tensor:
        """A SwiGLU MLP, [R, D]."""
        return forward.swiglu(x, self._source.linear(plan.up_gate)) @ self._source.linear(plan.down)

    def shared_share(self, plan: MoEPlan, x_RD: Tensor) -> Tensor:
        """How much of the shared experts' value each row takes, [R, 1]: 1 but where a gate decides."""
        if plan.shared_gate is None:
            return x_RD.new_ones(len(x_RD), 1)
        return (x_RD @ self._source.linear(plan.shared_gate)).sigmoid()

    def routed(self, plan: MoEPlan, x_RD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Expert after expert the rows that chose it and what it adds to them."""
        routing = self.route(plan, x_RD)
        for expert, mlp in enumerate(plan.experts):
            rows = routing.weights_RE[:, expert].nonzero().squeeze(1)
            yield (
                rows,
                self.mlp(mlp, x_RD.index_select(0, rows)) * routing.weights_RE[rows, expert].unsqueeze(1),
            )

    def route(self, plan: MoEPlan, x_RD: Tensor) -> forward.Routing:
        """Top-k routing; a router is never quantized."""
        router_DE = self._source.linear(plan.router)
        bias_E = self._source.correction_bias(plan.correction_bias).flatten()
        return forward.routing(x_RD, router_DE, bias_E, self._config)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the output head reads."""
        return self.norm(self._source.plan.final_norm, hidden)

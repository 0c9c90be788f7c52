"""Checkpoints held in memory whole: the original, and the quantized one whose parts ask for gradients.

Shapes: S windows, T tokens each, R rows (S·T), D hidden, F expert intermediate, E experts.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gpu_worker.config import ModelConfig
from gpu_worker.model.checkpoint_writer import plain_tensor, write_shard
from gpu_worker.model.plan import MoEPlan
from gpu_worker.model.safetensors_file import StoredTensor
from gpu_worker.model.stored_weight import StoredLinear, StoredVector
from gpu_worker.quantizer import forward
from gpu_worker.quantizer.projection import quantize_projection
from gpu_worker.quantizer.recipe import Tuning
from gpu_worker.quantizer.runner import LayerRunner
from gpu_worker.quantizer.source import Source

_NORM_RATE, _SCALE_RATE, _DENSE_RATE = 2e-3, 2e-3, 1e-4  # Adam's
_SCALE_NAMES = {"wint2": "super_scales", "wint2t": "super_scales", "wint4": "weight_scale"}
_OURS = "ernie."


class Held(Source):
    """A checkpoint whose weights stay in memory once read."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._weights: dict[str, Tensor] = {}
        self._experts: dict[str, tuple[Tensor, Tensor]] = {}

    def linear(self, stored: StoredLinear) -> Tensor:
        if stored.name not in self._weights:
            self._weights[stored.name] = super().linear(stored)
        return self._weights[stored.name]

    def vector(self, stored: StoredVector) -> Tensor:
        if stored.name not in self._weights:
            self._weights[stored.name] = super().vector(stored).float()
        return self._weights[stored.name]

    def embed(self, token_ids_ST: Tensor) -> Tensor:
        return self.vector(self.plan.embedding)[token_ids_ST.to(self.device)]

    def experts(self, plan: MoEPlan) -> tuple[Tensor, Tensor]:
        """A layer's routed experts: up_gate [E, D, 2F] and down [E, F, D]."""
        name = plan.experts[0].up_gate.name
        if name not in self._experts:
            read = super().linear
            up_gates, downs = zip(*((read(e.up_gate), read(e.down)) for e in plan.experts), strict=True)
            self._experts[name] = torch.stack(up_gates), torch.stack(downs)
        return self._experts[name]

    def hidden(self, token_ids_ST: Tensor) -> Tensor:
        """What the output head reads, [R, D]."""
        hidden_STD, runner = self.embed(token_ids_ST), _HeldRunner(self)
        for layer in range(self.config.num_hidden_layers):
            hidden_STD = runner.run(layer, hidden_STD)
        return runner.final_norm(hidden_STD).flatten(0, 1)


class _HeldRunner(LayerRunner):
    """Runs a layer's experts as one product where every token goes to all of them."""

    def __init__(self, source: Held) -> None:
        super().__init__(source)
        self._held = source

    def routed(self, plan: MoEPlan, x_RD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        weights_RE = self.route(plan, x_RD).weights_RE
        up_gate_EDF, down_EFD = self._held.experts(plan)
        if self._config.num_experts_per_token == self._config.num_experts:
            inner_ERF = forward.swiglu(x_RD, up_gate_EDF) * weights_RE.T.unsqueeze(2)
            yield torch.arange(len(x_RD), device=x_RD.device), _sum(inner_ERF, down_EFD)
            return
        for expert, weights_R in enumerate(weights_RE.unbind(1)):
            rows = weights_R.nonzero().squeeze(1)
            inner_RF = forward.swiglu(x_RD.index_select(0, rows), up_gate_EDF[expert])
            yield rows, inner_RF @ down_EFD[expert] * weights_R[rows].unsqueeze(1)


def _sum(inner_ERF: Tensor, down_EFD: Tensor) -> Tensor:
    """Σ over experts of inner·down, [R, D]."""
    return (inner_ERF.transpose(0, 1).flatten(1) @ down_EFD.flatten(0, 1)).float()


class _Bank:
    """One projection of all experts of a layer, the scales of their columns free."""

    def __init__(self, experts: Sequence[StoredLinear], device: torch.device) -> None:
        self._experts, self._device = experts, device
        dense = [expert.dense().T.to(device, torch.float32) for expert in experts]
        self._weight_EKN = torch.stack(dense)
        self.gain_E1N = _parameter(torch.ones(len(experts), 1, experts[0].num_outputs, device=device))

    def weight(self) -> Tensor:
        """f32 [E, K, N]."""
        return self._weight_EKN * self.gain_E1N

    def moved(self) -> Iterator[tuple[StoredTensor, dict[str, Tensor]]]:
        """What each expert now stores."""
        for expert, gain_1N in zip(self._experts, self.gain_E1N, strict=True):
            scale = expert.ranks[0][_SCALE_NAMES[expert.format]]
            yield scale, {scale.name: plain_tensor(scale.read().to(self._device) * gain_1N[0])}


class Tunable(Held):
    """A quantized checkpoint: norms, scales of experts, and what is outside them, are free."""

    def __init__(self, config: ModelConfig, device: torch.device, tuning: Tuning) -> None:
        super().__init__(config, device)
        weights = list(self.plan.weights())
        norms = [w for w in weights if isinstance(w, StoredVector) and w.kind == "norms"]
        self._norms = norms if tuning.rest else []
        self._dense = list(self._outside_experts()) if tuning.rest else []
        for norm in self._norms:
            self._weights[norm.name] = _parameter(self.vector(norm))
        for dense in self._dense:
            self._weights[dense.name] = _parameter(self.linear(dense))
        self._banks = {
            plan.experts[0].up_gate.name: (
                _Bank([e.up_gate for e in plan.experts], device),
                _Bank([e.down for e in plan.experts], device),
            )
            for plan in (layer.mlp for layer in self.plan.layers)
            if isinstance(plan, MoEPlan)
        }

    def experts(self, plan: MoEPlan) -> tuple[Tensor, Tensor]:
        up_gate, down = self._banks[plan.experts[0].up_gate.name]
        return up_gate.weight(), down.weight()

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        banks = list(self._every_bank())
        groups = (
            ([self._weights[norm.name] for norm in self._norms], _NORM_RATE),
            ([self._weights[dense.name] for dense in self._dense], _DENSE_RATE),
            ([bank.gain_E1N for bank in banks], _SCALE_RATE),
        )
        return [{"params": params, "lr": rate} for params, rate in groups if params]

    @property
    def is_static(self) -> bool:
        """Whether every step runs the same kernels on the same shapes."""
        return self.config.num_experts_per_token == self.config.num_experts

    def forget_gradients(self) -> None:
        """Before new ones are found."""
        for group in self.groups():
            for parameter in group["params"]:
                parameter.grad = None

    def write(self) -> None:
        """Replace what has moved in the files."""
        by_file: dict[Path, dict[str, Tensor]] = defaultdict(dict)
        for stored, tensors in self._moved():
            by_file[stored.file.path] |= tensors
        for path, tensors in by_file.items():
            write_shard(path, load_file(path) | tensors)

    def _moved(self) -> Iterator[tuple[StoredTensor, dict[str, Tensor]]]:
        for norm in self._norms:
            yield norm.ranks[0], {norm.name: plain_tensor(self._weights[norm.name])}
        for bank in self._every_bank():
            yield from bank.moved()
        for dense in self._dense:
            name, weight = dense.name.removeprefix(_OURS), self._weights[dense.name]
            first = next(iter(dense.ranks[0].values()))
            yield first, quantize_projection(name, weight, dense.format, "fast").tensors

    def _every_bank(self) -> Iterator[_Bank]:
        for banks in self._banks.values():
            yield from banks

    def _outside_experts(self) -> Iterator[StoredLinear]:
        for layer in self.plan.layers:
            yield from (layer.qkv, layer.o)
            mlp = layer.mlp.shared if isinstance(layer.mlp, MoEPlan) else layer.mlp
            if mlp is not None:
                yield from (mlp.up_gate, mlp.down)


def _parameter(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()

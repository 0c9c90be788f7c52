"""End-to-end tuning: what a quantized model stores in full width moves until it says what the original says.

Codes and local scales stay as the encoder left them. The weights of norms, the experts' column scales and the
projections outside the experts follow the gradient of KL(original ‖ quantized) on windows of text, and are
written back in the formats they had: no bit more is stored. Both models are in memory whole, so this is for
models that fit. Shapes: S windows, T tokens each, V vocabulary, K inputs, N outputs.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from gpu_worker.config import ModelConfig
from gpu_worker.model.checkpoint_writer import plain_tensor, write_shard
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.plan import MoEPlan
from gpu_worker.model.safetensors_file import StoredTensor
from gpu_worker.model.stored_weight import StoredLinear, StoredVector
from gpu_worker.quantizer.projection import quantize_projection
from gpu_worker.quantizer.runner import LayerRunner
from gpu_worker.quantizer.source import Source

_NORM_RATE, _SCALE_RATE, _DENSE_RATE = 2e-3, 2e-3, 2e-4  # Adam's
_BETAS = 0.9, 0.95
_WARM_UP = 4  # steps
_SCALE_NAMES = {"wint2": "super_scales", "wint2t": "super_scales", "wint4": "weight_scale"}
_OURS = "ernie."

OnProgress = Callable[[str, int, int], None]  # what is being done, done, total


def tune(source: Source, directory: Path, ids_ST: Tensor, steps: int, on_progress: OnProgress) -> list[float]:
    """Tune the checkpoint of ours in `directory` towards `source`, a window a step; returns the losses."""
    device = source.device
    model, original = _Tunable(read_model_config(directory), device), _Held(source.config, device)
    optimizer = torch.optim.Adam(model.groups(), betas=_BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = torch.randperm(len(ids_ST), generator=torch.Generator().manual_seed(0))
    losses = []
    for step in range(steps):
        on_progress("tuning", step, steps)
        loss = _divergence(model, original, ids_ST[order[step % len(order)]].unsqueeze(0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    on_progress("tuning", steps, steps)
    with torch.no_grad():
        model.write()
    return losses


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    return min(1.0, (step + 1) / _WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _divergence(model: Source, original: Source, ids_ST: Tensor) -> Tensor:
    """KL(original ‖ model) in nats, the mean over the tokens."""
    with _mixed_precision(model.device):
        with torch.no_grad():
            goal_TV = _log_probabilities(original, ids_ST)
        found_TV = _log_probabilities(model, ids_ST)
        return functional.kl_div(found_TV, goal_TV, reduction="batchmean", log_target=True)


def _mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 products where the machine has instructions for them."""
    has_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16)


def _log_probabilities(model: Source, ids_ST: Tensor) -> Tensor:
    """The logarithms of the next token's probabilities, f32 [S·T, V]."""
    hidden_STD, runner = model.embed(ids_ST), LayerRunner(model)
    for layer in range(model.config.num_hidden_layers):
        hidden_STD = runner.run(layer, hidden_STD)
    logits_STV = runner.final_norm(hidden_STD) @ model.head()
    return functional.log_softmax(logits_STV.flatten(0, 1).float(), dim=-1)


class _Held(Source):
    """A checkpoint whose weights stay in memory once read."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__(config, device)
        self._weights: dict[str, Tensor] = {}

    def linear(self, stored: StoredLinear) -> Tensor:
        if stored.name not in self._weights:
            self._weights[stored.name] = super().linear(stored)
        return self._weights[stored.name]

    def vector(self, stored: StoredVector) -> Tensor:
        if stored.name not in self._weights:
            self._weights[stored.name] = super().vector(stored).float()
        return self._weights[stored.name]


class _Tunable(_Held):
    """A quantized checkpoint whose full-width parts ask for gradients."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        super().__init__(config, device)
        weights = list(self.plan.weights())
        linears = [weight for weight in weights if isinstance(weight, StoredLinear)]
        self._norms = [w for w in weights if isinstance(w, StoredVector) and w.kind == "norms"]
        self._experts = [w for w in linears if w.kind == "experts" and w.format in _SCALE_NAMES]
        self._dense = list(self._outside_experts())
        self._gains = {w.name: _parameter(torch.ones(w.num_outputs, device=device)) for w in self._experts}
        for norm in self._norms:
            self._weights[norm.name] = _parameter(self.vector(norm))
        for dense in self._dense:
            self._weights[dense.name] = _parameter(super().linear(dense))

    def linear(self, stored: StoredLinear) -> Tensor:
        weight = super().linear(stored)
        return weight * self._gains[stored.name] if stored.name in self._gains else weight

    def groups(self) -> list[dict[str, object]]:
        """The optimizer's parameter groups."""
        norms, dense = ([self._weights[w.name] for w in part] for part in (self._norms, self._dense))
        return [
            {"params": norms, "lr": _NORM_RATE},
            {"params": list(self._gains.values()), "lr": _SCALE_RATE},
            {"params": dense, "lr": _DENSE_RATE},
        ]

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
        for expert in self._experts:
            scale = expert.ranks[0][_SCALE_NAMES[expert.format]]
            yield scale, {scale.name: plain_tensor(scale.read().to(self.device) * self._gains[expert.name])}
        for dense in self._dense:
            name, weight = dense.name.removeprefix(_OURS), self._weights[dense.name]
            first = next(iter(dense.ranks[0].values()))
            yield first, quantize_projection(name, weight, dense.format, "fast").tensors

    def _outside_experts(self) -> Iterator[StoredLinear]:
        for layer in self.plan.layers:
            yield from (layer.qkv, layer.o)
            mlp = layer.mlp.shared if isinstance(layer.mlp, MoEPlan) else layer.mlp
            if mlp is not None:
                yield from (mlp.up_gate, mlp.down)


def _parameter(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()

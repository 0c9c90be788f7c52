"""Reads a checkpoint of any layout for the quantizer: one weight in memory at a time, each finite."""

from collections.abc import Iterable

import torch
from torch import Tensor

from gpu_worker.config import ModelConfig
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.plan import LayerPlan, ModelPlan, plan_model
from gpu_worker.model.safetensors_file import StoredTensor
from gpu_worker.model.stored_weight import StoredLinear, StoredVector
from gpu_worker.quantizer.errors import QuantizeError
from gpu_worker.quantizer.forward import AttentionExtras


class Source:
    """The weights of the checkpoint in `config.path`, read to `device`; quantized ones are decoded.

    Raises CheckpointError with all that is missing, damaged or misshapen before anything is read.
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self._checkpoint = open_checkpoint(config.path)
        self.plan: ModelPlan = plan_model(config, self._checkpoint)

    @property
    def num_bytes(self) -> int:
        return self._checkpoint.num_bytes

    def layer(self, index: int) -> LayerPlan:
        return self.plan.layers[index]

    def linear(self, stored: StoredLinear) -> Tensor:
        """A projection, float32 [K, N]."""
        weight = stored.dense().T.to(self.device, torch.float32, copy=True).contiguous()
        _release(tensor for rank in stored.ranks for tensor in rank.values())
        return _finite(stored.name, weight)

    def vector(self, stored: StoredVector) -> Tensor:
        """A norm weight, bias or embedding in its stored precision."""
        tensor = stored.dense().to(self.device, copy=True)
        _release(stored.ranks)
        return _finite(stored.name, tensor)

    def attention_extras(self, layer: int) -> AttentionExtras:
        """What the families' attentions have beside two projections, float32."""
        plan = self.layer(layer)
        stored = plan.qkv_bias, plan.q_norm, plan.k_norm
        return AttentionExtras(*(self.vector(one).float() if one else None for one in stored))

    def correction_bias(self, stored: StoredVector | None) -> Tensor:
        """The experts' correction bias, float32 [1, experts]; zeros when the checkpoint has none."""
        num_experts = self.config.num_experts
        if stored is None:
            return torch.zeros(1, num_experts, device=self.device)
        return self.vector(stored).float().view(1, num_experts)

    def embed(self, token_ids_ST: Tensor) -> Tensor:
        """The residual stream's start, float32 [S, T, D]; only the pages of these rows are read."""
        rows = self.plan.embedding.dense()[token_ids_ST]
        _release(self.plan.embedding.ranks)
        return _finite(self.plan.embedding.name, rows.to(self.device).float())

    def head(self) -> Tensor:
        """The output head, float32 [D, V]; the embedding where it is tied."""
        if self.plan.lm_head is not None:
            return self.linear(self.plan.lm_head)
        return self.vector(self.plan.embedding).float().T


def _finite(name: str, weight: Tensor) -> Tensor:
    if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise QuantizeError(f"{name}: {bad} of {weight.numel()} values are NaN or infinite")
    return weight


def _release(tensors: Iterable[StoredTensor]) -> None:
    """Let the pages of mapped tensors go, so that a process's size does not grow to its checkpoint's."""
    for tensor in tensors:
        tensor.release()

"""Reads an unquantized ERNIE-4.5-MoE checkpoint, Hugging Face's or Paddle's layout, one memory-mapped tensor
at a time."""

from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.quantizer.errors import QuantizeError

_PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "up_gate_proj": ("gate_proj", "up_proj"),
}


class Source:
    """The tensors of one checkpoint directory, read to `device`.

    They are asked for by Paddle's fused names without the `ernie.` prefix.
    Raises CheckpointError when a shard is missing or damaged, QuantizeError when the checkpoint cannot be
    quantized.
    """

    def __init__(self, directory: Path, device: torch.device) -> None:
        self._device = device
        checkpoint = open_checkpoint(directory)
        if len(checkpoint.ranks) != 1:
            raise QuantizeError(
                f"{directory}: cut for {len(checkpoint.ranks)} ranks; quantize the uncut checkpoint"
            )
        self._tensors = checkpoint.ranks[0]
        if any(name.endswith(".quant_weight") for name in self._tensors):
            raise QuantizeError(f"{directory}: quantized already; quantize the full-precision checkpoint")
        self._prefix = "ernie." if any(name.startswith("ernie.") for name in self._tensors) else "model."

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """A tensor that both layouts store alike, in its stored dtype, on the device."""
        return self._read(self._prefix + name)

    def linear(self, name: str) -> Tensor:
        """A projection such as `layers.3.mlp.experts.0.up_gate_proj`, float32 [in, out], its parts side by
        side."""
        if self._prefix == "ernie.":
            return self._finite(name, self.tensor(f"{name}.weight").float())
        stem, _, leaf = name.rpartition(".")
        parts = [self.tensor(f"{stem}.{part}.weight") for part in _PARTS.get(leaf, (leaf,))]
        return self._finite(name, torch.cat(parts).float().T.contiguous())

    def router(self, layer: int) -> Tensor:
        """The router's weight, float32 [in, experts]."""
        weight = self.tensor(f"layers.{layer}.mlp.gate.weight").float()
        return weight if self._prefix == "ernie." else weight.T.contiguous()

    def correction_bias(self, layer: int) -> Tensor:
        """The experts' correction bias, float32 [1, experts]; zeros when the checkpoint has none."""
        name = f"layers.{layer}.mlp.moe_statics.e_score_correction_bias"
        num_experts = self.router(layer).shape[1]
        if name not in self:
            return torch.zeros(1, num_experts, device=self._device)
        return self.tensor(name).float().view(1, num_experts)

    def head(self) -> Tensor | None:
        """The output head [in, vocabulary], or None when the embedding serves."""
        if "lm_head.weight" not in self._tensors:
            return None
        weight = self._read("lm_head.weight")
        return weight if self._prefix == "ernie." else weight.T.contiguous()

    def _read(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise QuantizeError(f"the checkpoint has no tensor {name}")
        return self._tensors[name].read().to(self._device)

    def _finite(self, name: str, weight: Tensor) -> Tensor:
        bad = int((~torch.isfinite(weight)).sum())
        if bad:
            raise QuantizeError(
                f"{self._prefix}{name}: {bad} of {weight.numel()} weights are NaN or infinite"
            )
        return weight

"""How much each FFN neuron of the dense source contributes, over calibration windows: |activation| · ‖down
column‖."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from gpu_worker.config import ModelConfig
from gpu_worker.quantizer import forward
from wint2.demo.source import DenseModel


def neuron_importance(dense: DenseModel, config: ModelConfig, token_ids_ST: Tensor) -> Iterator[Tensor]:
    """For layer after layer, f32 [neurons], as the windows run through the dense model."""
    config = dataclasses.replace(config, moe_layer_start_index=config.num_hidden_layers)
    hidden = dense["token_embd.weight"][token_ids_ST]
    for layer in dense.layers():
        weights = {name: dense[f"blk.{layer}.{name}.weight"] for name in _NAMES}
        x = forward.normed(hidden, weights["attn_norm"], config)
        qkv = torch.cat([weights["attn_q"], weights["attn_k"], weights["attn_v"]]).T
        hidden = hidden + forward.attention(x, qkv, config) @ weights["attn_output"].T
        x = forward.normed(hidden, weights["ffn_norm"], config)
        inner = forward.swiglu(x, torch.cat([weights["ffn_gate"], weights["ffn_up"]]).T)
        hidden = hidden + inner @ weights["ffn_down"].T
        yield inner.flatten(0, 1).square().mean(dim=0).sqrt() * weights["ffn_down"].norm(dim=0)


_NAMES = (
    "attn_norm",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_norm",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
)

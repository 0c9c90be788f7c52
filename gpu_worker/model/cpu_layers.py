"""A decoder's layers as the records of the compiled call that runs them all, where they are of its kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cuda_kernels.compiled import cpu
from cuda_kernels.cpu.panels import PANEL, PanelExperts, PanelWeight
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.layers.linear import Linear, PanelSwiGLU
from gpu_worker.layers.moe import MoE, Router
from gpu_worker.model.decoder import Decoder, DecoderLayer


@dataclass(frozen=True, slots=True)
class CompiledLayers:
    """Stands for all layers and the final norm of a decoder, which owns the weights."""

    layers: Any  # records of layers.LAYER
    model: Any  # one of layers.STEP: the sizes that every step shares

    def __call__(self, hidden_TD: torch.Tensor, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """The final hidden state [T, D]; overwrites the one given."""
        self.layers["keys"], self.layers["values"] = kv_cache.addresses.T
        normed_TD: torch.Tensor = cpu.run_layers(
            self.model,
            self.layers,
            hidden_TD,
            batch.positions_T,
            batch.slot_mapping_T,
            batch.block_tables_SM,
            batch.cu_seqlens_q,
            batch.context_lens_S,
            kv_cache.block_size,
        )
        return normed_TD


def with_compiled_layers(decoder: Decoder) -> Decoder:
    """The same decoder, faster if the compiled call can run its layers; weights are shared."""
    if cpu is None or not all(_is_covered(layer) for layer in decoder.layers) or decoder.ranks.size > 1:
        return decoder
    cpu.compile_layers()
    layers = np.array([_layer(layer) for layer in decoder.layers], cpu.LAYER)
    return replace(decoder, compiled=CompiledLayers(layers, _model(decoder)))


def _is_covered(layer: DecoderLayer) -> bool:
    attention, mlp = layer.attention, layer.mlp
    is_plain = attention.qkv_bias is None and attention.q_norm is None and attention.head_dim % PANEL == 0
    covers_mlp = _is_covered_moe(mlp) if isinstance(mlp, MoE) else isinstance(mlp, PanelSwiGLU)
    projections = attention.qkv_proj.weight, attention.o_proj.weight
    return is_plain and covers_mlp and all(_is_whole(weight) for weight in projections)


def _is_covered_moe(moe: MoE) -> bool:
    is_plain = type(moe.router) is Router and moe.router.grouped is None and moe.num_splits == 1
    has_panels = isinstance(moe.experts, PanelExperts) and isinstance(moe.shared, PanelSwiGLU | None)
    return is_plain and has_panels and moe.shared_gate is None


def _is_whole(weight: object) -> bool:
    """Panels without filled up rows or columns."""
    return (
        isinstance(weight, PanelWeight)
        and weight.num_k == weight.num_inputs
        and weight.num_outputs % PANEL == 0
        and weight.num_inputs % PANEL == 0
    )


def _layer(layer: DecoderLayer) -> tuple[Any, ...]:
    """In the order of layers.LAYER's fields."""
    attention, mlp = layer.attention, layer.mlp
    bias, router, routed = 0, _NO_LINEAR, _NO_NETWORK
    shared = mlp.network if isinstance(mlp, PanelSwiGLU) else None
    if isinstance(mlp, MoE):
        bias, router = mlp.router.correction_bias_E.data_ptr(), _linear(mlp.router.weight)
        routed = _network(mlp.experts)
        shared = mlp.shared.network if isinstance(mlp.shared, PanelSwiGLU) else None
    return (
        layer.input_norm.weight_D.data_ptr(),
        layer.post_attention_norm.weight_D.data_ptr(),
        0,
        0,
        bias,
        _linear(attention.qkv_proj),
        _linear(attention.o_proj),
        router,
        routed,
        _NO_NETWORK if shared is None else _network(shared),
    )


def _linear(linear: Linear) -> tuple[int, ...]:
    assert isinstance(linear.weight, PanelWeight)
    return _panels(linear.weight)


def _panels(weight: PanelWeight) -> tuple[int, ...]:
    return (
        cpu.compile_kernel(weight),
        *weight.panels,
        weight.addresses[1],
        weight.num_k,
        int(weight.quantizes),
    )


def _network(network: object) -> tuple[Any, ...]:
    assert isinstance(network, PanelExperts)
    expert = network.experts[0]
    return *network.tables, _panels(expert.up), _panels(expert.down)


_NO_LINEAR: tuple[int, ...] = (0,) * 7
_NO_NETWORK: tuple[Any, ...] = (*(0,) * 5, _NO_LINEAR, _NO_LINEAR)


def _model(decoder: Decoder) -> Any:
    """What is the same in every step."""
    config, attention = decoder.config, decoder.layers[0].attention
    step = cpu.new_step()
    step["width"] = config.hidden_size
    step["num_heads"], step["num_kv_heads"] = attention.num_heads, attention.num_kv_heads
    step["head_bytes"], step["cos_sin"] = 4 * attention.head_dim, attention.cos_sin_PC.data_ptr()
    step["num_experts"], step["num_activated"] = config.num_experts, config.num_experts_per_token
    step["final_norm"] = decoder.final_norm.weight_D.data_ptr()
    step["eps"], step["norm_min"] = config.rms_norm_eps, config.norm_min
    step["scale"] = attention.head_dim**-0.5
    return step

"""One rank's part of a model: heads and hidden features, dealt out over a tensor-parallel group.

    qkv, gate, up     outputs     of the rank's heads or features
    o, down           inputs      the same ones; the ranks' results are summed
    embedding, head, router, norms        whole on every rank

Any checkpoint gives any degree: one that was cut for another degree is cut and joined again, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cuda_kernels.formats.layout import GROUP_SIZE
from gpu_worker.config import ModelConfig
from gpu_worker.model.errors import ConfigError
from gpu_worker.model.plan import LayerPlan, MLPPlan, ModelPlan, MoEPlan
from gpu_worker.model.stored_slice import slice_linear
from gpu_worker.model.stored_weight import StoredLinear


@dataclass(frozen=True, slots=True)
class Shard:
    """A rank of a group of `size`."""

    rank: int = 0
    size: int = 1

    def share(self, num_units: int) -> range:
        """This rank's units; every rank has as many as another, or one less."""
        return range(num_units * self.rank // self.size, num_units * (self.rank + 1) // self.size)


def check_degree(config: ModelConfig, size: int) -> None:
    """Raises ConfigError where `size` ranks cannot share the model."""
    if config.num_key_value_heads % size:
        message = f"{size} does not divide the model's {config.num_key_value_heads} key-value heads"
        raise ConfigError("tensor_parallel_size", f"tensor_parallel_size: {message}")
    widths = {config.intermediate_size, config.moe_intermediate_size}
    if _num_groups(min(widths)) < size:
        message = f"{size} ranks cannot share {min(widths)} hidden features in groups of {GROUP_SIZE}"
        raise ConfigError("tensor_parallel_size", f"tensor_parallel_size: {message}")


def shard_config(config: ModelConfig, shard: Shard) -> ModelConfig:
    """The config of one rank's attention."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // shard.size,
        num_key_value_heads=config.num_key_value_heads // shard.size,
    )


def shard_plan(plan: ModelPlan, config: ModelConfig, shard: Shard) -> ModelPlan:
    """The weights of one rank. `config` is the whole model's."""
    return replace(plan, layers=tuple(_shard_layer(layer, config, shard) for layer in plan.layers))


def _shard_layer(layer: LayerPlan, config: ModelConfig, shard: Shard) -> LayerPlan:
    query = _heads(config.num_attention_heads, config.head_dim, shard)
    key = _heads(config.num_key_value_heads, config.head_dim, shard)
    return replace(
        layer,
        qkv=slice_linear(layer.qkv, (query, key, key), range(layer.qkv.num_inputs)),
        o=slice_linear(layer.o, (range(layer.o.num_outputs),), query),
        mlp=_shard_moe(layer.mlp, shard) if isinstance(layer.mlp, MoEPlan) else _shard_mlp(layer.mlp, shard),
    )


def _heads(num_heads: int, head_dim: int, shard: Shard) -> range:
    heads = shard.share(num_heads)
    return range(heads.start * head_dim, heads.stop * head_dim)


def _shard_moe(moe: MoEPlan, shard: Shard) -> MoEPlan:
    shared = _shard_mlp(moe.shared, shard) if moe.shared else None
    parts = _parts(moe.experts[0].down, _features(moe.experts[0].down, shard))
    experts = [_slice_mlp(expert, part) for expert in moe.experts for part in parts]
    return replace(moe, experts=tuple(experts), shared=shared, num_splits=len(parts))


def _parts(down: StoredLinear, features: range) -> list[range]:
    """The features by the files that hold them, where each file has scales of its own.

    An expert is the sum of such parts, so they may count as experts that are always chosen together.
    """
    num_files = len(down.ranks) if down.cut == "inputs" and down.format != "none" else 1
    size = down.num_inputs // num_files
    if size % GROUP_SIZE or features.start % size or features.stop % size:
        return [features]
    return [range(begin, begin + size) for begin in range(features.start, features.stop, size)]


def _shard_mlp(mlp: MLPPlan, shard: Shard) -> MLPPlan:
    return _slice_mlp(mlp, _features(mlp.down, shard))


def _features(down: StoredLinear, shard: Shard) -> range:
    groups = shard.share(_num_groups(down.num_inputs))
    return range(groups.start * GROUP_SIZE, min(groups.stop * GROUP_SIZE, down.num_inputs))


def _slice_mlp(mlp: MLPPlan, features: range) -> MLPPlan:
    return MLPPlan(
        slice_linear(mlp.up_gate, (features, features), range(mlp.up_gate.num_inputs)),
        slice_linear(mlp.down, (range(mlp.down.num_outputs),), features),
    )


def _num_groups(width: int) -> int:
    return -(-width // GROUP_SIZE)

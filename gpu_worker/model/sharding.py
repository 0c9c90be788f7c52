"""One rank's part of a model: heads, hidden features and vocabulary, dealt out over a tensor-parallel group.

    qkv, gate, up     outputs     of the rank's heads or features
    o, down           inputs      the same ones; the ranks' results are summed
    embedding, head   vocabulary  a stretch of it
    router, norms     whole on every rank, but for a norm over all heads together

Where there are fewer key-value heads than ranks, several ranks have the same one.
Any checkpoint gives any degree: one that was cut for another degree is cut and joined again, exactly.
"""

from __future__ import annotations

from dataclasses import replace

from cuda_kernels.formats.layout import GROUP_SIZE
from gpu_worker.config import ModelConfig
from gpu_worker.layers.ranks import Ranks
from gpu_worker.model.plan import LayerPlan, MLPPlan, ModelPlan, MoEPlan
from gpu_worker.model.stored_slice import slice_linear, slice_vector
from gpu_worker.model.stored_weight import StoredLinear, StoredVector


def degree_problem(config: ModelConfig, size: int) -> str | None:
    """Why `size` ranks cannot share the model, or None."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % size:
        return f"{size} does not divide the model's {heads} attention heads"
    if kv_heads % size and size % kv_heads:
        return f"{size} neither divides nor is a multiple of the model's {kv_heads} key-value heads"
    width = min(_widths(config))
    if _num_groups(width) < size:
        return f"{size} ranks cannot share {width} hidden features in groups of {GROUP_SIZE}"
    return None


def shard_config(config: ModelConfig, ranks: Ranks) -> ModelConfig:
    """The config of one rank's attention."""
    return replace(
        config,
        num_attention_heads=len(ranks.share(config.num_attention_heads)),
        num_key_value_heads=len(_kv_heads(config, ranks)),
    )


def shard_plan(plan: ModelPlan, config: ModelConfig, ranks: Ranks) -> ModelPlan:
    """The weights of one rank. `config` is the whole model's."""
    words = ranks.stretch(config.vocab_size)
    return replace(
        plan,
        embedding=slice_vector(plan.embedding, (words,), config.vocab_size),
        layers=tuple(_shard_layer(layer, config, ranks) for layer in plan.layers),
        lm_head=slice_linear(plan.lm_head, (words,), range(config.hidden_size)) if plan.lm_head else None,
    )


def _shard_layer(layer: LayerPlan, config: ModelConfig, ranks: Ranks) -> LayerPlan:
    query = _features_of(ranks.share(config.num_attention_heads), config)
    key = _features_of(_kv_heads(config, ranks), config)
    return replace(
        layer,
        qkv=slice_linear(layer.qkv, (query, key, key), range(layer.qkv.num_inputs)),
        o=slice_linear(layer.o, (range(layer.o.num_outputs),), query),
        mlp=_shard_moe(layer.mlp, ranks) if isinstance(layer.mlp, MoEPlan) else _shard_mlp(layer.mlp, ranks),
        qkv_bias=_shard_bias(layer.qkv_bias, config, query, key),
        q_norm=_shard_norm(layer.q_norm, config, config.num_attention_heads, query),
        k_norm=_shard_norm(layer.k_norm, config, config.num_key_value_heads, key),
    )


def _shard_bias(
    bias: StoredVector | None, config: ModelConfig, query: range, key: range
) -> StoredVector | None:
    if bias is None:
        return None
    num_query = config.num_attention_heads * config.head_dim
    num_key = config.num_key_value_heads * config.head_dim
    parts = query, _shifted(key, num_query), _shifted(key, num_query + num_key)
    return slice_vector(bias, parts, num_query + 2 * num_key)


def _shard_norm(
    norm: StoredVector | None, config: ModelConfig, num_heads: int, features: range
) -> StoredVector | None:
    """Of each head by itself: the same for all; of all heads together: those of the rank."""
    if norm is None or config.qk_norm == "head":
        return norm
    return slice_vector(norm, (features,), num_heads * config.head_dim)


def _kv_heads(config: ModelConfig, ranks: Ranks) -> range:
    num_heads = config.num_key_value_heads
    if num_heads >= ranks.size:
        return ranks.share(num_heads)
    head = ranks.rank * num_heads // ranks.size
    return range(head, head + 1)


def _features_of(heads: range, config: ModelConfig) -> range:
    return range(heads.start * config.head_dim, heads.stop * config.head_dim)


def _shifted(features: range, offset: int) -> range:
    return range(features.start + offset, features.stop + offset)


def _shard_moe(moe: MoEPlan, ranks: Ranks) -> MoEPlan:
    shared = _shard_mlp(moe.shared, ranks) if moe.shared else None
    parts = _parts(moe.experts[0].down, _features(moe.experts[0].down, ranks))
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


def _shard_mlp(mlp: MLPPlan, ranks: Ranks) -> MLPPlan:
    return _slice_mlp(mlp, _features(mlp.down, ranks))


def _features(down: StoredLinear, ranks: Ranks) -> range:
    groups = ranks.share(_num_groups(down.num_inputs))
    return range(groups.start * GROUP_SIZE, min(groups.stop * GROUP_SIZE, down.num_inputs))


def _slice_mlp(mlp: MLPPlan, features: range) -> MLPPlan:
    return MLPPlan(
        slice_linear(mlp.up_gate, (features, features), range(mlp.up_gate.num_inputs)),
        slice_linear(mlp.down, (range(mlp.down.num_outputs),), features),
    )


def _num_groups(width: int) -> int:
    return -(-width // GROUP_SIZE)


def _widths(config: ModelConfig) -> set[int]:
    """Hidden features of the model's feed-forward networks."""
    layers = range(config.num_hidden_layers)
    has_moe = any(map(config.is_moe_layer, layers))
    has_dense = not all(map(config.is_moe_layer, layers))
    widths = {config.moe_intermediate_size, config.shared_size} if has_moe else set()
    return widths - {0} | ({config.intermediate_size} if has_dense else set())

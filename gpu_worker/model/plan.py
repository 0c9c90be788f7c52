"""Which stored weights make up the model: all found and checked before the first is read."""

from __future__ import annotations

from dataclasses import dataclass

from gpu_worker.config import ModelConfig
from gpu_worker.model.checkpoint import Checkpoint
from gpu_worker.model.errors import CheckpointError
from gpu_worker.model.stored_weight import StoredLinear, StoredVector
from gpu_worker.model.tensor_finder import Layout, TensorFinder, detect_layout


@dataclass(frozen=True, slots=True)
class MLPPlan:
    up_gate: StoredLinear
    down: StoredLinear


@dataclass(frozen=True, slots=True)
class MoEPlan:
    router: StoredLinear
    correction_bias: StoredVector | None
    experts: tuple[MLPPlan, ...]
    shared: MLPPlan | None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    input_norm: StoredVector
    qkv: StoredLinear
    o: StoredLinear
    post_attention_norm: StoredVector
    mlp: MLPPlan | MoEPlan


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Every weight of the model in its checkpoint. `lm_head` is None where the embedding serves."""

    layout: Layout
    embedding: StoredVector
    layers: tuple[LayerPlan, ...]
    final_norm: StoredVector
    lm_head: StoredLinear | None
    notes: tuple[str, ...]  # what was left out, for the log


def plan_model(config: ModelConfig, checkpoint: Checkpoint) -> ModelPlan:
    """Find and check every weight. Raises CheckpointError with everything that is missing or misshapen."""
    finder = TensorFinder(checkpoint, detect_layout(checkpoint))
    hidden_size = config.hidden_size
    plan = ModelPlan(
        finder.layout,
        finder.vector("embed_tokens.weight", (config.vocab_size, hidden_size), "outputs"),
        tuple(_plan_layer(config, finder, index) for index in range(config.num_hidden_layers)),
        finder.vector("norm.weight", (hidden_size,)),
        _plan_lm_head(config, finder),
        finder.notes(),
    )
    if finder.problems:
        raise CheckpointError(finder.problems)
    return plan


def _plan_layer(config: ModelConfig, finder: TensorFinder, index: int) -> LayerPlan:
    layer, hidden = f"layers.{index}.", config.hidden_size
    query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    is_moe = config.is_moe_layer(index)
    return LayerPlan(
        finder.vector(f"{layer}input_layernorm.weight", (hidden,)),
        finder.fused(f"{layer}self_attn.", finder.layout.qkv, hidden, (query, key, key)),
        finder.linear(f"{layer}self_attn.o_proj", query, hidden, "inputs"),
        finder.vector(f"{layer}post_attention_layernorm.weight", (hidden,)),
        _plan_moe(config, finder, f"{layer}mlp.")
        if is_moe
        else _plan_mlp(finder, f"{layer}mlp.", hidden, config.intermediate_size),
    )


def _plan_moe(config: ModelConfig, finder: TensorFinder, prefix: str) -> MoEPlan:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    bias, shared = f"{prefix}moe_statics.e_score_correction_bias", inner * config.num_shared_experts
    experts = range(config.num_experts)
    return MoEPlan(
        finder.linear(f"{prefix}gate", hidden, config.num_experts, "none"),
        finder.vector(bias, (1, config.num_experts)) if bias in finder else None,
        tuple(_plan_mlp(finder, f"{prefix}experts.{expert}.", hidden, inner) for expert in experts),
        _plan_mlp(finder, f"{prefix}shared_experts.", hidden, shared) if shared else None,
    )


def _plan_mlp(finder: TensorFinder, prefix: str, hidden: int, inner: int) -> MLPPlan:
    return MLPPlan(
        finder.fused(prefix, finder.layout.up_gate, hidden, (inner, inner)),
        finder.linear(f"{prefix}down_proj", inner, hidden, "inputs"),
    )


def _plan_lm_head(config: ModelConfig, finder: TensorFinder) -> StoredLinear | None:
    """A stored head wins over `tie_word_embeddings`, which copies of published configs disagree about."""
    if finder.has_lm_head:
        return finder.lm_head(config.hidden_size, config.vocab_size)
    if not config.tie_word_embeddings:
        finder.problems.append("lm_head.weight is missing, and config.json does not tie it to the embedding")
    return None

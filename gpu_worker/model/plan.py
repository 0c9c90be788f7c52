"""Which stored weights make up the model: all found and checked before the first is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpu_worker.config import ModelConfig, QuantFormat
from gpu_worker.model.checkpoint import Checkpoint
from gpu_worker.model.errors import CheckpointError
from gpu_worker.model.families import FAMILIES
from gpu_worker.model.stored_weight import Kind, StoredLinear, StoredVector
from gpu_worker.model.tensor_finder import Layout, TensorFinder, detect_layout

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class MLPPlan:
    up_gate: StoredLinear
    down: StoredLinear

    def weights(self) -> Iterator[StoredLinear | StoredVector]:
        yield from (self.up_gate, self.down)


@dataclass(frozen=True, slots=True)
class MoEPlan:
    router: StoredLinear
    correction_bias: StoredVector | None
    experts: tuple[MLPPlan, ...]
    shared: MLPPlan | None
    shared_gate: StoredLinear | None = None
    num_splits: int = 1  # so many of `experts`, side by side, are one expert's hidden features

    def weights(self) -> Iterator[StoredLinear | StoredVector]:
        yield self.router
        yield from (weight for weight in (self.correction_bias, self.shared_gate) if weight)
        for mlp in (*self.experts, *((self.shared,) if self.shared else ())):
            yield from mlp.weights()


@dataclass(frozen=True, slots=True)
class LayerPlan:
    input_norm: StoredVector
    qkv: StoredLinear
    o: StoredLinear
    post_attention_norm: StoredVector
    mlp: MLPPlan | MoEPlan
    qkv_bias: StoredVector | None = None
    q_norm: StoredVector | None = None
    k_norm: StoredVector | None = None

    def weights(self) -> Iterator[StoredLinear | StoredVector]:
        yield from (self.input_norm, self.qkv, self.o, self.post_attention_norm)
        yield from (weight for weight in (self.qkv_bias, self.q_norm, self.k_norm) if weight)
        yield from self.mlp.weights()


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Every weight of the model in its checkpoint. `lm_head` is None where the embedding serves."""

    layout: Layout
    embedding: StoredVector
    layers: tuple[LayerPlan, ...]
    final_norm: StoredVector
    lm_head: StoredLinear | None
    notes: tuple[str, ...]  # what was left out, for the log

    def weights(self) -> Iterator[StoredLinear | StoredVector]:
        """Every weight once, in no particular order."""
        yield from (self.embedding, self.final_norm)
        yield from (self.lm_head,) if self.lm_head else ()
        for layer in self.layers:
            yield from layer.weights()

    @property
    def num_ranks(self) -> int:
        """Of the checkpoint."""
        return len(self.final_norm.ranks)

    @property
    def stored_bytes(self) -> int:
        return sum(weight.stored_bytes for weight in self.weights())


def plan_model(config: ModelConfig, checkpoint: Checkpoint) -> ModelPlan:
    """Find and check every weight. Raises CheckpointError with everything that is missing or misshapen."""
    family = FAMILIES[config.model_type]
    return plan_with(config, TensorFinder(checkpoint, detect_layout(checkpoint), family))


def plan_with(config: ModelConfig, finder: TensorFinder) -> ModelPlan:
    """The model's weights as `finder` finds them. Raises CheckpointError with all of its problems."""
    hidden_size = config.hidden_size
    plan = ModelPlan(
        finder.layout,
        finder.vector("embed_tokens.weight", "embedding", (config.vocab_size, hidden_size), "outputs"),
        tuple(_plan_layer(config, finder, index) for index in range(config.num_hidden_layers)),
        finder.vector("norm.weight", "norms", (hidden_size,)),
        _plan_lm_head(config, finder),
        finder.notes(),
    )
    if finder.problems:
        raise CheckpointError(finder.problems)
    return replace(plan, notes=(*plan.notes, *_format_notes(config, plan)))


def configured_format(config: ModelConfig, name: str, kind: Kind) -> QuantFormat:
    """How config.json says that a projection is stored."""
    if kind == "experts" and (layer := _LAYER.search(name)):
        return config.quantization.expert_format(int(layer[1]))
    return config.quantization.dense if kind in ("attention", "dense MLP", "shared experts") else "none"


def _format_notes(config: ModelConfig, plan: ModelPlan) -> Iterator[str]:
    """Where the files and config.json differ: the files are believed, yet the preflight believed it."""
    pairs = Counter(
        (weight.kind, weight.format, configured_format(config, weight.name, weight.kind))
        for weight in plan.weights()
        if isinstance(weight, StoredLinear)
    )
    for (kind, found, said), count in pairs.items():
        if found != said:
            stored = f"{count} projections are stored as {_spell(found)}"
            yield f"{kind}: {stored}, config.json says {_spell(said)}"


def _spell(form: QuantFormat) -> str:
    return "full precision" if form == "none" else form


def _plan_layer(config: ModelConfig, finder: TensorFinder, index: int) -> LayerPlan:
    layer, hidden, head_dim = f"layers.{index}.", config.hidden_size, config.head_dim
    attention = f"{layer}self_attn."
    query, key = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    norm_sizes = {"none": (), "head": (head_dim, head_dim), "all": (query, key)}[config.qk_norm]
    norms = [
        finder.qk_norm(f"{attention}{name}_norm.weight", head_dim, size)
        for name, size in zip("qk", norm_sizes, strict=False)
    ]
    return LayerPlan(
        finder.vector(f"{layer}input_layernorm.weight", "norms", (hidden,)),
        finder.qkv(attention, head_dim, hidden, (query, key, key)),
        finder.linear(f"{attention}o_proj", "attention", query, hidden, "inputs"),
        finder.vector(f"{layer}post_attention_layernorm.weight", "norms", (hidden,)),
        _plan_moe(config, finder, f"{layer}mlp.")
        if config.is_moe_layer(index)
        else _plan_mlp(finder, f"{layer}mlp.", "dense MLP", hidden, config.intermediate_size),
        finder.qkv_bias(attention, head_dim, (query, key, key)) if config.has_qkv_bias else None,
        *norms,
    )


def _plan_moe(config: ModelConfig, finder: TensorFinder, prefix: str) -> MoEPlan:
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    bias, shared = f"{prefix}moe_statics.e_score_correction_bias", config.shared_size
    experts = [f"{prefix}experts.{expert}." for expert in range(config.num_experts)]
    return MoEPlan(
        finder.linear(f"{prefix}gate", "router", hidden, config.num_experts, "none"),
        finder.correction_bias(bias, config.num_experts) if bias in finder else None,
        tuple(_plan_mlp(finder, expert, "experts", hidden, inner) for expert in experts),
        _plan_mlp(finder, f"{prefix}shared_experts.", "shared experts", hidden, shared) if shared else None,
        finder.linear(f"{prefix}shared_expert_gate", "router", hidden, 1, "none")
        if config.has_shared_gate
        else None,
    )


def _plan_mlp(finder: TensorFinder, prefix: str, kind: Kind, hidden: int, inner: int) -> MLPPlan:
    return MLPPlan(
        finder.fused(prefix, kind, finder.layout.up_gate, hidden, (inner, inner)),
        finder.linear(f"{prefix}down_proj", kind, inner, hidden, "inputs"),
    )


def _plan_lm_head(config: ModelConfig, finder: TensorFinder) -> StoredLinear | None:
    """A stored head wins over `tie_word_embeddings`, which copies of published configs disagree about."""
    if finder.has_lm_head:
        return finder.lm_head(config.hidden_size, config.vocab_size)
    if not config.tie_word_embeddings:
        finder.problems.append("lm_head.weight is missing, and config.json does not tie it to the embedding")
    return None

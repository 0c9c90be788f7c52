"""What a GPU needs beside weights and KV cache, estimated from a plan: a step's activations, graphs, CUDA.

The sizes are those that layers and kernels allocate, at the moment when they hold most:

    attention   qkv [T, N], attended [T, N]                     bfloat16, as is all that names no other
    dense MLP   gate and up [T, 2F], then their product twice
    experts     h [R, F], its halves [R, F], y [R, D] float32
    everywhere  the stream [T, D] five times: what a layer was called with, its two sums, its norm
    at the end  logits [S, V], as float32, and float64 twice where they are drawn from

A quantized dense weight that many tokens meet is decoded first. CUDA's own share is what a GPU was seen to
lack beyond that: on an H100 with ERNIE 21B 2.6 GiB in all, on an H200 with 300B 5.6 (docs/performance.md).

Shapes: T tokens and S sequences of a step, D hidden, F intermediate, N outputs, R = T·A routed rows,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from cuda_kernels.formats.layout import ROW_MULTIPLE
from cuda_kernels.tiled_linear import MAX_STREAMED_ROWS
from gpu_worker.config import ModelConfig, SchedulerConfig
from gpu_worker.engine.memory import GIB
from gpu_worker.model.plan import LayerPlan, MLPPlan, ModelPlan, MoEPlan
from gpu_worker.model.stored_weight import StoredLinear

_CUDA_BYTES = int(1.6 * GIB)  # context, kernels, libraries' workspaces, the allocator's first segments
_FRAGMENTS = 0.005  # of the weights: what the allocator rounds up
_STREAMS = 5
_HALF, _FLOAT, _DOUBLE = 2, 4, 8


@dataclass(frozen=True, slots=True)
class Reserve:
    """Bytes on one rank. Graphs are captured last, in what `--gpu-memory-utilization` leaves free."""

    cuda_bytes: int
    step_bytes: int
    graph_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.cuda_bytes + self.step_bytes


def estimate_reserve(plan: ModelPlan, config: ModelConfig, limits: SchedulerConfig) -> Reserve:
    """`plan` is of one rank, `config` of the whole model."""
    num_seqs = limits.max_num_seqs
    weight_bytes = sum(weight.stored_bytes for weight in plan.weights())
    table_bytes = config.max_position_embeddings * config.head_dim * _FLOAT
    kept_logits = num_seqs * config.vocab_size * _FLOAT
    return Reserve(
        _CUDA_BYTES + int(_FRAGMENTS * weight_bytes) + table_bytes,
        _step_bytes(plan, config, limits.max_num_batched_tokens, num_seqs),
        kept_logits + _step_bytes(plan, config, num_seqs, num_seqs),
    )


def _step_bytes(plan: ModelPlan, config: ModelConfig, num_tokens: int, num_seqs: int) -> int:
    stream = _STREAMS * num_tokens * config.hidden_size * _HALF
    layers = max(_layer_bytes(layer, config, num_tokens) for layer in plan.layers)
    logits = num_seqs * config.vocab_size * (_HALF + _FLOAT + 2 * _DOUBLE)
    return max(stream + layers, num_tokens * config.hidden_size * _HALF + logits)


def _layer_bytes(layer: LayerPlan, config: ModelConfig, num_tokens: int) -> int:
    mlp = layer.mlp
    return max(
        _attention_bytes(layer, num_tokens),
        _moe_bytes(mlp, config.num_experts_per_token, num_tokens)
        if isinstance(mlp, MoEPlan)
        else _mlp_bytes(mlp, num_tokens),
    )


def _attention_bytes(layer: LayerPlan, num_tokens: int) -> int:
    qkv = num_tokens * layer.qkv.num_outputs * _HALF
    attended = num_tokens * layer.o.num_inputs * _HALF
    out = num_tokens * layer.o.num_outputs * _HALF
    return qkv + max(
        _decoded_bytes(layer.qkv, num_tokens), attended + out + _decoded_bytes(layer.o, num_tokens)
    )


def _mlp_bytes(mlp: MLPPlan, num_tokens: int) -> int:
    up_gate = num_tokens * mlp.up_gate.num_outputs * _HALF
    inner = num_tokens * mlp.down.num_inputs * _HALF
    out = num_tokens * mlp.down.num_outputs * _HALF
    first = up_gate + max(_decoded_bytes(mlp.up_gate, num_tokens), 2 * inner)
    return max(first, inner + out + _decoded_bytes(mlp.down, num_tokens))


def _moe_bytes(moe: MoEPlan, num_activated: int, num_tokens: int) -> int:
    down = moe.experts[0].down
    num_rows = num_tokens * num_activated * moe.num_splits
    inner = num_rows * down.num_inputs * _HALF
    halves = num_rows * _round_up(down.num_inputs, ROW_MULTIPLE) * _HALF if down.format == "wint2" else 0
    out = num_tokens * down.num_outputs * _HALF
    routed = inner + num_rows * down.num_outputs * _FLOAT + max(halves, out)
    return max(routed, out + _mlp_bytes(moe.shared, num_tokens)) if moe.shared else routed


def _decoded_bytes(stored: StoredLinear, num_tokens: int) -> int:
    """Of the copy that a matrix library multiplies many tokens with."""
    if stored.format == "none" or num_tokens <= MAX_STREAMED_ROWS:
        return 0
    return stored.num_outputs * stored.num_inputs * _HALF


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

"""All layers of a decoder in one compiled call, which saves a step some four hundred calls from Python.

Operation for operation what the layers do with the ops, and to the bit. Records hold addresses and sizes; a
feed-forward network is a mixture of experts, one network that every token takes (`shared`), or both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba.core.dispatcher import Dispatcher

from cuda_kernels.cpu.arrays import Bytes, Floats, Ints, SmallInts
from cuda_kernels.cpu.attention import FLOAT32, attention
from cuda_kernels.cpu.caching import compiled
from cuda_kernels.cpu.elementwise import add_row
from cuda_kernels.cpu.experts import Kept
from cuda_kernels.cpu.experts import prepare as prepare_experts
from cuda_kernels.cpu.linear import prepare as prepare_linear
from cuda_kernels.cpu.panels import PANEL
from cuda_kernels.cpu.rows import add_rms_norm, kv_store, rope, route
from cuda_kernels.cpu.team import run
from cuda_kernels.cpu.vector import keep


def _integers(names: str) -> list[tuple[str, type]]:
    return [(name, np.int64) for name in names.split()]


LINEAR = np.dtype(_integers("kernel panels stride num_panels scale num_k quantizes"))
# `table` is 0 where there is no such network.
NETWORK = np.dtype(
    [*_integers("table num_experts order order_length slots"), ("up", LINEAR), ("down", LINEAR)]
)
LAYER = np.dtype(
    [
        *_integers("input_norm post_norm keys values bias"),
        *((name, LINEAR) for name in ("qkv", "o", "router")),
        *((name, NETWORK) for name in ("routed", "shared")),
    ]
)
STEP = np.dtype(
    [
        *_integers("num_tokens width num_heads num_kv_heads head_bytes num_experts num_activated"),
        *_integers(
            "positions slots num_sequences block_tables num_blocks cu_seqlens context_lens block_size"
        ),
        *_integers("cos_sin final_norm state give_way linear_job up_gate_job down_job attention_job"),
        *_integers("float32_kernel scattered_kernel"),
        *((name, np.float64) for name in ("eps", "norm_min", "scale")),
    ]
)

Record = Any
ExpertWork = tuple[Ints, Ints, Kept]

_F = TypeVar("_F", bound=Callable[..., Any])


def _inner(function: _F) -> Dispatcher[_F]:
    """Compiled for compiled code only: what Python would call it through takes time to compile."""
    return compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_inner
def _prepare_linear(step: Record, weight: Record, x: Floats, y: Floats) -> tuple[Ints, Bytes]:
    """What the job takes for y = x · W, and what must be kept until it is done."""
    return prepare_linear(
        weight.kernel,
        (x.ctypes.data, 4 * x.shape[1]),
        (y.ctypes.data, 4 * y.shape[1]),
        len(x),
        (weight.panels, weight.stride, weight.num_panels),
        weight.scale,
        weight.num_k,
        weight.quantizes != 0,
    )


@_inner
def _multiply(step: Record, weight: Record, x: Floats) -> Floats:
    """x [T, K] times the weight: [T, whole panels]."""
    y = np.empty((len(x), weight.num_panels * PANEL), np.float32)
    given, levels = _prepare_linear(step, weight, x, y)
    run((step.state, step.give_way), ((step.linear_job, given.ctypes.data),))
    keep(x)
    keep(given)
    keep(levels)
    return y


@_inner
def _attend(step: Record, layer: Record, x: Floats) -> Floats:
    """Self-attention, its keys and values stored."""
    fused = _multiply(step, layer.qkv, x)
    heads, stride, num_tokens = fused.ctypes.data, 4 * fused.shape[1], len(x)
    num_turned, kv_bytes = step.num_heads + step.num_kv_heads, step.num_kv_heads * step.head_bytes
    rope(heads, stride, num_turned, step.head_bytes, step.positions, num_tokens, step.cos_sin)
    keys, values = heads + step.num_heads * step.head_bytes, heads + num_turned * step.head_bytes
    kv_store(keys, stride, layer.keys, kv_bytes, step.slots, num_tokens)
    kv_store(values, stride, layer.values, kv_bytes, step.slots, num_tokens)
    out = np.empty((num_tokens, step.num_heads * step.head_bytes // 4), np.float32)
    attention(
        (step.state, step.give_way),
        step.attention_job,
        (step.float32_kernel, step.scattered_kernel),
        (heads, stride),
        (out.ctypes.data, 4 * out.shape[1]),
        (layer.keys, layer.values, step.block_size),
        (step.num_heads, step.num_kv_heads, step.head_bytes),
        (step.num_sequences, step.block_tables, step.num_blocks, step.cu_seqlens, step.context_lens),
        (FLOAT32, 0, 0, 0),
        step.scale,
    )
    keep(fused)
    return _multiply(step, layer.o, out)


@_inner
def _prepare_experts(network: Record, x: Floats, routing: tuple[int, int, int], y: Floats) -> ExpertWork:
    """What the two jobs take, and what must be kept until they are done; nothing to do without a network."""
    up, down = network.up, network.down
    return prepare_experts(
        (up.kernel, down.kernel),
        (up.quantizes != 0, down.quantizes != 0),
        (network.table, max(1, network.num_experts), network.order, network.order_length, network.slots),
        (up.num_k, up.stride, up.num_panels),
        (down.num_k, down.stride, down.num_panels),
        (x.ctypes.data, len(x), x.shape[1]),
        routing,
        y.ctypes.data,
    )


@_inner
def _choose(step: Record, layer: Record, logits: Floats, ids: SmallInts, weights: Floats) -> None:
    """Which experts take each token."""
    shape = logits.ctypes.data, len(logits), step.num_experts, logits.shape[1]
    route(shape, layer.bias, step.norm_min, ids.ctypes.data, weights.ctypes.data, step.num_activated)


@_inner
def _feed_forward(step: Record, layer: Record, x: Floats) -> Floats:
    """The experts that the router chooses plus the shared one, in three jobs.

    router, shared gate and up | chosen experts' gate and up | everyone's down
    """
    team = step.state, step.give_way
    y, shared = np.zeros(x.shape, np.float32), np.zeros(x.shape, np.float32)
    logits = np.empty((len(x), layer.router.num_panels * PANEL), np.float32)
    router, levels = _prepare_linear(step, layer.router, x, logits)
    shared_up, shared_down, kept = _prepare_experts(layer.shared, x, (0, 0, 1), shared)
    linear_job, up_gate_job, down_job = step.linear_job, step.up_gate_job, step.down_job
    run(team, ((linear_job, router.ctypes.data), (up_gate_job, shared_up.ctypes.data)))
    ids = np.empty((len(x), step.num_activated), np.int32)
    weights = np.empty((len(x), step.num_activated), np.float32)
    routing: tuple[Any, Any, Any] = 0, 0, 1
    if layer.routed.table:
        _choose(step, layer, logits, ids, weights)
        routing = np.int64(ids.ctypes.data), np.int64(weights.ctypes.data), step.num_activated
    up, down, kept_too = _prepare_experts(layer.routed, x, routing, y)
    run(team, ((up_gate_job, up.ctypes.data),))
    run(team, ((down_job, down.ctypes.data), (down_job, shared_down.ctypes.data)))
    add_row(y.ctypes.data, shared.ctypes.data, y.ctypes.data, y.size)
    _keep_all((x, shared, logits, weights), (router, shared_up, shared_down, up, down), ids, levels)
    keep(kept)
    keep(kept_too)
    return y


@_inner
def _keep_all(floats: Any, numbers: Any, ids: SmallInts, levels: Bytes) -> None:
    """Hold what jobs were given addresses of until here."""


@_inner
def _norm(step: Record, x: Floats, residual: Floats, weight: int) -> Floats:
    """The norm of residual += x."""
    out, total = np.empty(x.shape, np.float32), residual.ctypes.data
    add_rms_norm(x.ctypes.data, total, total, weight, step.eps, out.ctypes.data, len(x), x.shape[1])
    keep(x)
    keep(residual)
    return out


@compiled
def run_layers(steps: Record, layers: Record, hidden: Floats) -> Floats:
    """Embedded tokens [T, D] to what the head reads; `steps` is one record. Overwrites `hidden`."""
    step, y = steps[0], np.zeros(hidden.shape, np.float32)
    for index in range(len(layers)):
        layer = layers[index]
        attended = _attend(step, layer, _norm(step, y, hidden, layer.input_norm))
        y = _feed_forward(step, layer, _norm(step, attended, hidden, layer.post_norm))
    normed: Floats = _norm(step, y, hidden, step.final_norm)
    return normed

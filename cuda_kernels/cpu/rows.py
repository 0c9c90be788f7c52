"""Compiled loops over the rows of a step: normalization, rotary embedding, writing to the KV cache, routing.

Arguments are addresses, sizes, and strides in bytes.
"""

from __future__ import annotations

import math

import numpy as np
from numba.np.numpy_support import carray

from cuda_kernels.cpu.arrays import Floats, SmallInts
from cuda_kernels.cpu.caching import compiled
from cuda_kernels.cpu.elementwise import add_row, copy_row, rms_norm_row, rotate_row
from cuda_kernels.cpu.vector import keep, pointer


@compiled
def add_rms_norm(
    x: int, residual: int, total: int, weight: int, eps: float, out: int, num_rows: int, width: int
) -> None:
    """total = residual + x where there is a residual; out = the norm of it, or of x."""
    epsilon = np.array([eps], np.float32)
    for row in range(num_rows):
        at = row * width * 4
        source = x + at
        if residual:
            source = total + at
            add_row(residual + at, x + at, source, width)
        rms_norm_row(source, weight, epsilon.ctypes.data, out + at, width)
    keep(epsilon)


@compiled
def rope(
    heads: int, stride: int, num_heads: int, head_bytes: int, positions: int, num_rows: int, cos_sin: int
) -> None:
    """`num_heads` heads of each row, side by side, turned in place."""
    position_T = carray(pointer(positions), (num_rows,), np.int64)
    for row in range(num_rows):
        angles = cos_sin + position_T[row] * head_bytes
        for head in range(num_heads):
            rotate_row(heads + row * stride + head * head_bytes, angles, head_bytes // 4)


@compiled
def kv_store(rows: int, stride: int, cache: int, slot_bytes: int, slots: int, num_rows: int) -> None:
    """Rows to their slots of a cache; slot -1 is none."""
    slot_T = carray(pointer(slots), (num_rows,), np.int64)
    for row in range(num_rows):
        if slot_T[row] >= 0:
            copy_row(rows + row * stride, cache + slot_T[row] * slot_bytes, slot_bytes // 4)


@compiled
def route(
    logits: tuple[int, int, int, int], bias: int, norm_min: float, ids: int, weights: int, num_activated: int
) -> None:
    """`logits`: address, tokens, experts, width of a row; see the op."""
    _, num_tokens, num_experts, width = logits
    logits_TE = carray(pointer(logits[0]), (num_tokens, width), np.float32)[:, :num_experts]
    bias_E = carray(pointer(bias), (num_experts,), np.float32)
    ids_TA = carray(pointer(ids), (num_tokens, num_activated), np.int32)
    weights_TA = carray(pointer(weights), (num_tokens, num_activated), np.float32)
    probabilities_E, scores_E = np.empty(num_experts, np.float32), np.empty(num_experts, np.float32)
    for token in range(num_tokens):
        _softmax(logits_TE[token], bias_E, probabilities_E, scores_E)
        _choose(scores_E, probabilities_E, np.float32(norm_min), ids_TA[token], weights_TA[token])


@compiled
def _softmax(logits: Floats, bias: Floats, probabilities: Floats, scores: Floats) -> None:
    """The experts' probabilities, and those plus bias."""
    peak, total = logits[0], np.float32(0)
    for expert in range(1, len(logits)):
        peak = max(peak, logits[expert])
    for expert in range(len(logits)):
        probabilities[expert] = math.exp(logits[expert] - peak)
        total += probabilities[expert]
    for expert in range(len(logits)):
        probabilities[expert] /= total
        scores[expert] = probabilities[expert] + bias[expert]


@compiled
def _choose(
    scores: Floats, probabilities: Floats, norm_min: np.float32, ids: SmallInts, weights: Floats
) -> None:
    """The best experts, ties to the lower id; their probabilities brought to sum 1."""
    total = np.float32(0)
    for rank in range(len(ids)):
        best = 0
        for expert in range(1, len(scores)):
            if scores[expert] > scores[best]:
                best = expert
        ids[rank] = best
        scores[best] = -np.inf
        total += probabilities[best]
    for rank in range(len(ids)):
        weights[rank] = probabilities[ids[rank]] / max(total, norm_min)

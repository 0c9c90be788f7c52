"""Compiles what every model needs before the first request does: each op once, on next to nothing."""

from __future__ import annotations

import time
from functools import cache

import torch

from cuda_kernels.cpu import ops
from cuda_kernels.cpu.panels import PANEL, PanelExpert, pack_dense, stack_experts


@cache
def compile_kernels() -> float:
    """The seconds it took: a dozen where nothing is in Numba's cache, less than one where all is."""
    begin = time.perf_counter()
    weight = pack_dense(torch.zeros(PANEL, PANEL))
    rows, cache = torch.zeros(1, PANEL), torch.zeros(1, 1, 1, PANEL)
    one, zero = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    ids, shares = ops.route(ops.linear(rows, weight), rows[0], 1, 1e-12)
    only = stack_experts([PanelExpert(weight, weight, weight)], "natural")
    ops.experts(rows, only, torch.zeros_like(ids), shares)
    ops.add_rms_norm(rows, rows, rows[0], 1.0)
    heads = rows.view(1, 1, PANEL)
    ops.rope(heads, zero, rows)
    ops.kv_store(heads, cache, zero)
    ops.attention(
        heads, cache, cache, zero.int().view(1, 1), torch.tensor([0, 1], dtype=torch.int32), one, 1.0
    )
    number = rows[0, :1]
    ops.draw(rows, (number, one, number, number), number.double())
    ops.penalise(rows, zero, zero, rows, rows)
    ops.forbid(rows, zero, one.view(1, 1))
    ops.find_likeliest(rows, 1)
    return time.perf_counter() - begin

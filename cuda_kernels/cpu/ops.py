"""The compiled CPU half of the ops: tensors to addresses, and out again. float32, contiguous but where said.

Shapes: T tokens, K inputs, N outputs, D hidden, E experts, A activated experts per token, H query heads, G KV
heads, C head dim, B blocks, P slots in a block, S sequences, M blocks of the longest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F

from cuda_kernels.cache_format import CacheScales
from cuda_kernels.cpu import attention as compiled_attention
from cuda_kernels.cpu import experts as compiled_experts
from cuda_kernels.cpu import layers as compiled_layers
from cuda_kernels.cpu import linear as compiled_linear
from cuda_kernels.cpu import rows
from cuda_kernels.cpu import sampling as compiled_sampling
from cuda_kernels.cpu.kernels import address_of
from cuda_kernels.cpu.panels import PANEL, PanelExperts, PanelWeight
from cuda_kernels.cpu.team import address_of as job_address
from cuda_kernels.cpu.team import team_of
from cuda_kernels.cpu.vector import LANES

LAYER = compiled_layers.LAYER
_JOBS = {
    "linear_job": compiled_linear.job,
    "up_gate_job": compiled_experts.up_gate_job,
    "down_job": compiled_experts.down_job,
    "attention_job": compiled_attention.job,
}

# What may run beside this thread, as the operating system has it.
_MAX_THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_KINDS = {
    torch.float32: compiled_attention.FLOAT32,
    torch.bfloat16: compiled_attention.BFLOAT16,
    torch.int8: compiled_attention.INT8,
    torch.float8_e4m3fn: compiled_attention.BYTE,
}


def _team() -> tuple[int, int]:
    """As many threads as torch takes, of those that can run at once."""
    return team_of(min(torch.get_num_threads(), _MAX_THREADS)).awake()


def fits(x: torch.Tensor) -> bool:
    """Whether the row operations take it: rows of whole vectors, the heads of a token side by side."""
    is_dense = x.stride(-1) == 1 and (x.ndim < 3 or x.stride(1) == x.shape[2])
    return x.dtype == torch.float32 and not x.is_cuda and is_dense and x.shape[-1] % LANES == 0


def linear(x_TK: torch.Tensor, weight: PanelWeight) -> torch.Tensor:
    """x times the weight: [T, N]."""
    missing = weight.num_k - x_TK.shape[1]
    x_TK = F.pad(x_TK, (0, missing)) if missing else x_TK.contiguous()
    num_rows, width = x_TK.shape
    padded = PANEL * weight.panels[2]
    y_TN = torch.empty((num_rows, padded))
    compiled_linear.linear(
        _team(),
        job_address(compiled_linear.job),
        address_of(weight.kernel),
        (x_TK.data_ptr(), 4 * width),
        (y_TN.data_ptr(), 4 * padded),
        num_rows,
        weight.panels,
        weight.addresses[1],
        weight.num_k,
        weight.quantizes,
    )
    return y_TN if padded == weight.num_outputs else y_TN[:, : weight.num_outputs].contiguous()


def experts(
    hidden_TD: torch.Tensor,
    weights: PanelExperts,
    expert_ids_TA: torch.Tensor | None = None,
    expert_weights_TA: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weighted sum of each token's experts, or the one network that there is: [T, D]."""
    hidden_TD = hidden_TD.contiguous()
    up, down = weights.experts[0].up, weights.experts[0].down
    padded = PANEL * down.sizes[2]
    y_TD = torch.empty((hidden_TD.shape[0], padded))
    routing = 0, 0, 1
    if expert_ids_TA is not None and expert_weights_TA is not None:
        routing = expert_ids_TA.data_ptr(), expert_weights_TA.data_ptr(), expert_ids_TA.shape[1]
    compiled_experts.experts(
        _team(),
        (job_address(compiled_experts.up_gate_job), job_address(compiled_experts.down_job)),
        (address_of(up.kernel), address_of(down.kernel)),
        (up.quantizes, down.quantizes),
        weights.tables,
        up.sizes,
        down.sizes,
        (hidden_TD.data_ptr(), *hidden_TD.shape),
        routing,
        y_TD.data_ptr(),
    )
    return y_TD if padded == down.num_outputs else y_TD[:, : down.num_outputs].contiguous()


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    x_TD = x_TD.contiguous()
    out_TD = torch.empty_like(x_TD)
    rows.add_rms_norm(x_TD.data_ptr(), 0, 0, weight_D.data_ptr(), eps, out_TD.data_ptr(), *_rows(x_TD))
    return out_TD


def add_rms_norm(
    x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, residual + x)."""
    x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
    out_TD, sum_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    sums = x_TD.data_ptr(), residual_TD.data_ptr(), sum_TD.data_ptr()
    rows.add_rms_norm(*sums, weight_D.data_ptr(), eps, out_TD.data_ptr(), *_rows(x_TD))
    return out_TD, sum_TD


def _rows(x: torch.Tensor) -> tuple[int, int]:
    """How many rows, how wide."""
    width = x.shape[-1]
    return x.numel() // width, width


def rope(x_THC: torch.Tensor, positions_T: torch.Tensor, cos_sin_PC: torch.Tensor) -> None:
    """In place; the heads of a token lie side by side, tokens at any distance."""
    num_tokens, num_heads, head_dim = x_THC.shape
    heads = x_THC.data_ptr(), 4 * x_THC.stride(0), num_heads, 4 * head_dim
    rows.rope(*heads, positions_T.data_ptr(), num_tokens, cos_sin_PC.data_ptr())


def kv_store(rows_TGC: torch.Tensor, cache_BPGC: torch.Tensor, slot_mapping_T: torch.Tensor) -> None:
    """The heads of a token lie side by side, tokens at any distance."""
    source, target = (
        (rows_TGC.data_ptr(), 4 * rows_TGC.stride(0)),
        (cache_BPGC.data_ptr(), 4 * cache_BPGC.stride(1)),
    )
    rows.kv_store(*source, *target, slot_mapping_T.data_ptr(), len(slot_mapping_T))


def route(
    logits_TE: torch.Tensor, correction_bias_E: torch.Tensor, num_activated: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [T, A] int32, weights [T, A])."""
    logits_TE = logits_TE.contiguous()
    num_tokens, num_experts = logits_TE.shape
    ids_TA = torch.empty((num_tokens, num_activated), dtype=torch.int32)
    weights_TA = torch.empty((num_tokens, num_activated))
    logits = logits_TE.data_ptr(), num_tokens, num_experts, num_experts
    results = ids_TA.data_ptr(), weights_TA.data_ptr()
    rows.route(logits, correction_bias_E.data_ptr(), norm_min, *results, num_activated)
    return ids_TA, weights_TA


def attention(
    query_THC: torch.Tensor,
    key_cache_BPGC: torch.Tensor,
    value_cache_BPGC: torch.Tensor,
    block_tables_SM: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens_S: torch.Tensor,
    scale: float,
    scales: CacheScales | None = None,
) -> torch.Tensor:
    """[T, H, C]; C is a multiple of 64, the heads of a token lie side by side, tokens at any distance."""
    _, num_heads, head_dim = query_THC.shape
    block_size, num_kv_heads = key_cache_BPGC.shape[1:3]
    out_THC = torch.empty(query_THC.shape)
    tables = block_tables_SM.contiguous()
    key_scales, value_scales = (x.data_ptr() for x in scales) if scales else (0, 0)
    byte_values = _byte_values().data_ptr()
    compiled_attention.attention(
        _team(),
        job_address(compiled_attention.job),
        (address_of("float32"), address_of("scattered")),
        (query_THC.data_ptr(), 4 * query_THC.stride(0)),
        (out_THC.data_ptr(), 4 * out_THC.stride(0)),
        (key_cache_BPGC.data_ptr(), value_cache_BPGC.data_ptr(), block_size),
        (num_heads, num_kv_heads, 4 * head_dim),
        (len(tables), tables.data_ptr(), tables.shape[1], cu_seqlens_q.data_ptr(), context_lens_S.data_ptr()),
        (_KINDS[key_cache_BPGC.dtype], byte_values, key_scales, value_scales),
        scale,
    )
    return out_THC


def draw(
    logits_SV: torch.Tensor, wishes: Iterable[torch.Tensor], uniform_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids int64 [S], largest logits [S])."""
    num_rows, vocab_size = logits_SV.shape
    token_ids_S, peaks_S = torch.empty(num_rows, dtype=torch.int64), torch.empty(num_rows)
    logits = logits_SV.data_ptr(), 4 * logits_SV.stride(0), num_rows, vocab_size
    temperature, top_k, top_p, min_p = (wish.data_ptr() for wish in wishes)
    wanted = temperature, top_k, top_p, min_p, uniform_S.data_ptr()
    compiled_sampling.draw(logits, wanted, token_ids_S.data_ptr(), peaks_S.data_ptr())
    return token_ids_S, peaks_S


def penalise(
    logits_SV: torch.Tensor,
    positions_X: torch.Tensor,
    rows_X: torch.Tensor,
    divisor_NV: torch.Tensor,
    loss_NV: torch.Tensor,
) -> None:
    """In place."""
    logits = logits_SV.data_ptr(), 4 * logits_SV.stride(0), logits_SV.shape[1]
    where = positions_X.data_ptr(), rows_X.data_ptr(), len(rows_X)
    compiled_sampling.penalise(logits, *where, divisor_NV.data_ptr(), loss_NV.data_ptr())


def find_likeliest(values_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [R, K], ids int64 [R, K]), K = `count`."""
    num_rows, width = values_RV.shape
    best_RK, ids_RK = torch.empty(num_rows, count), torch.empty((num_rows, count), dtype=torch.int64)
    values = values_RV.data_ptr(), num_rows, width
    compiled_sampling.find_likeliest(values, count, best_RK.data_ptr(), ids_RK.data_ptr())
    return best_RK, ids_RK


def forbid(logits_SV: torch.Tensor, positions_X: torch.Tensor, masks_XW: torch.Tensor) -> None:
    """In place."""
    logits = logits_SV.data_ptr(), 4 * logits_SV.stride(0), logits_SV.shape[1]
    num_masks, num_words = masks_XW.shape
    compiled_sampling.forbid(logits, positions_X.data_ptr(), num_masks, masks_XW.data_ptr(), num_words)


def new_step() -> np.ndarray[Any, Any]:
    """One record of a step with what is the same in all steps of all models."""
    step = np.zeros(1, compiled_layers.STEP)
    for name, job in _JOBS.items():
        step[name] = job_address(job)
    step["float32_kernel"], step["scattered_kernel"] = address_of("float32"), address_of("scattered")
    return step


def compile_kernel(weight: PanelWeight) -> int:
    """The address of the kernel that multiplies this weight, compiled if none was before."""
    return address_of(weight.kernel)


def compile_layers() -> None:
    """What `run_layers` takes seconds for when nothing is in Numba's cache."""
    records = (np.empty(1, compiled_layers.STEP), np.empty(1, compiled_layers.LAYER), np.empty((1, 1), "f4"))
    compiled_layers.run_layers.compile(tuple(map(numba.typeof, records)))


def run_layers(
    model: np.ndarray[Any, Any],
    layers: np.ndarray[Any, Any],
    hidden_TD: torch.Tensor,
    positions_T: torch.Tensor,
    slot_mapping_T: torch.Tensor,
    block_tables_SM: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens_S: torch.Tensor,
    block_size: int,
) -> torch.Tensor:
    """A decoder's layers and final norm: [T, D], over a float32 cache. Overwrites `hidden_TD`.

    `model` is a step's record with the model's sizes, `layers` are records of layers.LAYER.
    """
    step, tables = model.copy(), block_tables_SM.contiguous()
    step["state"], step["give_way"] = _team()
    step["num_sequences"], step["num_blocks"] = tables.shape
    step["positions"], step["slots"] = positions_T.data_ptr(), slot_mapping_T.data_ptr()
    step["block_tables"], step["block_size"] = tables.data_ptr(), block_size
    step["cu_seqlens"], step["context_lens"] = cu_seqlens_q.data_ptr(), context_lens_S.data_ptr()
    return torch.from_numpy(compiled_layers.run_layers(step, layers, hidden_TD.numpy()))


@cache
def _byte_values() -> torch.Tensor:
    """What each byte means as e4m3."""
    return torch.arange(256).byte().view(torch.float8_e4m3fn).float()

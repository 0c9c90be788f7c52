"""`paged_attention` on a GPU: which kernel reads what, and a torch form for shapes that no kernel has.

Shapes: T tokens, S sequences, H query heads, G KV heads, C head dim, B blocks, P slots in a block,
M blocks of the longest sequence, N = M·P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from cuda_kernels.build import Variant
from cuda_kernels.cache_format import CacheScales, gather_blocks
from cuda_kernels.launch import Argument, Device, check

HEAD_DIMS = (64, 128)
FORMATS = {torch.bfloat16: 0, torch.int8: 1, torch.float8_e4m3fn: 2}  # as in csrc/attention.cuh
_DECODE_ROWS, _PREFILL_ROWS = 16, 64  # query rows of a block
_DECODE_THREADS = _PREFILL_THREADS = 128
_DECODE_WARPS, _PREFILL_KEYS = 4, 64
_HOPPER_ROWS, _HOPPER_THREADS, _HOPPER_SLOTS = 128, 384, 6
_MIN_BLOCK = 16  # the decode kernel takes that many neighbouring slots for one block's
_BLOCKS_PER_MULTIPROCESSOR = 4
_MAX_SHARES, _MIN_KEYS = 32, 128
_MAX_COUNTERS = 2**16
_Kind = Literal["decode", "prefill", "hopper"]
_MAX_GATHERED = 2**26  # elements of keys that the torch form holds at a time


@dataclass(frozen=True, slots=True)
class Step:
    """What a step's attention reads beside the queries; as in `paged_attention`."""

    key_cache_BPGC: Tensor
    value_cache_BPGC: Tensor
    block_tables_SM: Tensor
    cu_seqlens_q: Tensor
    context_lens_S: Tensor
    scales: CacheScales | None = None

    @property
    def caches(self) -> tuple[tuple[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
        """Keys and values, each with its scales."""
        key_scales, value_scales = self.scales or (None, None)
        return (self.key_cache_BPGC, key_scales), (self.value_cache_BPGC, value_scales)

    @property
    def format(self) -> int:
        return FORMATS[self.key_cache_BPGC.dtype]

    @property
    def num_sequences(self) -> int:
        return self.context_lens_S.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.key_cache_BPGC.shape[2]

    @property
    def block_size(self) -> int:
        return self.key_cache_BPGC.shape[1]

    @property
    def max_context(self) -> int:
        return self.block_tables_SM.shape[1] * self.block_size


def has_kernel(query_THC: Tensor, step: Step) -> bool:
    """Whether the kernels take these shapes and dtypes."""
    group = query_THC.shape[1] // step.num_kv_heads
    return (
        query_THC.dtype == torch.bfloat16
        and step.key_cache_BPGC.dtype in FORMATS
        and query_THC.shape[2] in HEAD_DIMS
        and group <= _DECODE_ROWS
        and step.block_size >= _MIN_BLOCK
        and step.block_size.bit_count() == 1
    )


def launch_attention(
    device: Device, query_THC: Tensor, step: Step, max_query_len: int, scale: float
) -> Tensor:
    """[T, H, C] by the kernels: one for sequences with one new token, one for those with several.

    `query_THC` may be a view of the projection: a token's heads lie side by side, tokens at any distance.
    """
    num_heads, head_dim = query_THC.shape[1:]
    check("key_cache", step.key_cache_BPGC, (None, None, None, head_dim), tuple(FORMATS))
    check("block_tables", step.block_tables_SM, (step.num_sequences, None), (torch.int32,))
    check("cu_seqlens_q", step.cu_seqlens_q, (step.num_sequences + 1,), (torch.int32,))
    check("context_lens", step.context_lens_S, (step.num_sequences,), (torch.int32,))
    out_THC = query_THC.new_empty(query_THC.shape)
    inputs: list[Argument] = [query_THC, step.key_cache_BPGC, step.value_cache_BPGC]
    inputs += [*(step.scales or (None, None)), step.block_tables_SM]
    inputs += [step.cu_seqlens_q, step.context_lens_S, out_THC]
    shape: list[Argument] = [num_heads, step.num_kv_heads, query_THC.stride(0) // 8]
    shape += [step.block_size.bit_length() - 1, step.block_tables_SM.shape[1], scale / math.log(2)]
    if len(query_THC):
        _launch_decode(device, step, head_dim, inputs, shape)
    if max_query_len > 1:
        _launch_prefill(device, step, query_THC, inputs, shape)
    return out_THC


def _launch_decode(
    device: Device, step: Step, head_dim: int, inputs: list[Argument], shape: list[Argument]
) -> None:
    num_rows = step.num_sequences * step.num_kv_heads
    if num_rows > _MAX_COUNTERS:
        raise ValueError(f"paged_attention: {num_rows} sequences × KV heads exceed {_MAX_COUNTERS}")
    shares = choose_shares(num_rows, step.max_context, device.num_multiprocessors)
    width, where = head_dim + 4, step.context_lens_S.device
    scratch = torch.empty(num_rows * shares * _DECODE_ROWS * width, dtype=torch.float32, device=where)
    arguments = [*inputs, scratch, _counters(where), shares, *shape]
    shared_bytes = _DECODE_ROWS * (_DECODE_WARPS * width + _MAX_SHARES + 2) * 4 + 16
    grid = num_rows, shares
    device.launch(
        _variant("decode", head_dim, step.format),
        "attention_decode",
        grid,
        _DECODE_THREADS,
        shared_bytes,
        arguments,
        overlaps=True,
    )


def _launch_prefill(
    device: Device, step: Step, query_THC: Tensor, inputs: list[Argument], shape: list[Argument]
) -> None:
    num_tokens, num_heads, head_dim = query_THC.shape
    kind: _Kind = "hopper" if step.format == 0 and device.has_warpgroup_products else "prefill"
    rows, threads = (_HOPPER_ROWS, _HOPPER_THREADS) if kind == "hopper" else (_PREFILL_ROWS, _PREFILL_THREADS)
    tile_tokens = rows // (num_heads // step.num_kv_heads)
    tiles = num_tokens // tile_tokens + step.num_sequences
    arguments = [*inputs, step.num_sequences, tile_tokens, tiles, *shape]
    device.launch(
        _variant(kind, head_dim, step.format),
        f"attention_{kind}",
        (tiles, step.num_kv_heads),
        threads,
        _hopper_bytes(head_dim) if kind == "hopper" else _prefill_bytes(step, head_dim),
        arguments,
        overlaps=True,
    )


def _prefill_bytes(step: Step, head_dim: int) -> int:
    """Two stages of keys and values, padded, and their scales."""
    pair = 4 * head_dim + 80 if step.format == 0 else 2 * head_dim + 48
    return 2 * _PREFILL_KEYS * (pair + 8)


def _hopper_bytes(head_dim: int) -> int:
    """The queries, the ring of keys and values, its barriers."""
    return (1 + _HOPPER_SLOTS) * _HOPPER_ROWS * 2 * head_dim + (2 * _HOPPER_SLOTS + 1) * 8


def choose_shares(num_rows: int, max_context: int, num_multiprocessors: int) -> int:
    """Into how many shares a sequence's keys are cut: enough blocks to fill the GPU, 128 keys at least."""
    wanted = -(-_BLOCKS_PER_MULTIPROCESSOR * num_multiprocessors // num_rows)
    return max(1, min(wanted, -(-max_context // _MIN_KEYS), _MAX_SHARES))


def variants(
    head_dim: int, cache_dtype: torch.dtype = torch.bfloat16, *, is_hopper: bool = False
) -> list[Variant]:
    """Every kernel that the op may ask for."""
    if head_dim not in HEAD_DIMS or cache_dtype not in FORMATS:
        return []
    prefill: _Kind = "hopper" if is_hopper and cache_dtype == torch.bfloat16 else "prefill"
    return [_variant(kind, head_dim, FORMATS[cache_dtype]) for kind in ("decode", prefill)]


def _variant(kind: _Kind, head_dim: int, form: int) -> Variant:
    return Variant(f"attention_{kind}", (("HEAD_DIM", head_dim), ("FORMAT", form)))


@cache
def _counters(where: torch.device) -> Tensor:
    """Zeros, which every launch leaves as zeros."""
    return torch.zeros(_MAX_COUNTERS, dtype=torch.int32, device=where)


def attention_by_token(query_THC: Tensor, step: Step, scale: float) -> Tensor:
    """The same in torch, each token with its own copy of the keys, without waiting for the device."""
    num_tokens, _, head_dim = query_THC.shape
    token_T = torch.arange(num_tokens, device=query_THC.device)
    sequence_T = torch.searchsorted(step.cu_seqlens_q[1:].contiguous(), token_T, right=True)
    sequence_T = sequence_T.clamp(max=step.num_sequences - 1)
    last_T = step.context_lens_S[sequence_T] - step.cu_seqlens_q[sequence_T + 1] + token_T
    size = max(1, _MAX_GATHERED // (step.max_context * step.num_kv_heads * head_dim))
    out_THC = torch.empty_like(query_THC, memory_format=torch.contiguous_format)
    for start in range(0, num_tokens, size):
        part = slice(start, start + size)
        blocks_TM = step.block_tables_SM[sequence_T[part]].long()
        keys_TNGC, values_TNGC = (_gather(*kv, blocks_TM) for kv in step.caches)
        query_TGRC = query_THC[part].float().unflatten(1, (step.num_kv_heads, -1)) * scale
        scores_TGRN = query_TGRC @ keys_TNGC.permute(0, 2, 3, 1)
        is_future_TN = torch.arange(step.max_context, device=query_THC.device) > last_T[part].unsqueeze(1)
        weights_TGRN = scores_TGRN.masked_fill(is_future_TN[:, None, None], -torch.inf).softmax(-1)
        out_THC[part] = (weights_TGRN @ values_TNGC.transpose(1, 2)).flatten(1, 2).to(out_THC.dtype)
    return out_THC


def _gather(cache_BPGC: Tensor, scales_BGP: Tensor | None, blocks_TM: Tensor) -> Tensor:
    """Float32 [T, N, G, C]."""
    values_IPGC = gather_blocks(cache_BPGC, scales_BGP, blocks_TM.flatten()).transpose(1, 2)
    return values_IPGC.reshape(len(blocks_TM), -1, *cache_BPGC.shape[2:])

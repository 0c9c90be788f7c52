"""Ops `draw`, `penalise`, `forbid`, `find_likeliest`: from rows of logits to tokens.

A draw inverts the cumulative distribution, in the order of the vocabulary, so it takes one uniform number
and is a function of its row alone.

Shapes: S rows of logits, V vocabulary, W = V / 32 words of a mask, X rows that are edited, N rows of the
penalties' tables, R rows of K largest values.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cuda_kernels.build import Variant
from cuda_kernels.compiled import cpu
from cuda_kernels.launch import Argument, Device, check, cuda_device

_MAX_THREADS, _EDIT_THREADS = 1024, 256  # as in csrc/sampling.cu
_LOGITS_A_THREAD = 8


class Wishes(NamedTuple):
    """What rows ask of their draws, [S] each: float32, but top_k, which is int32."""

    temperature_S: torch.Tensor  # 0: the likeliest
    top_k_S: torch.Tensor  # 0: all
    top_p_S: torch.Tensor
    min_p_S: torch.Tensor


def draw(
    logits_SV: torch.Tensor, wishes: Wishes, uniform_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids int64 [S], each row's largest logit [S], a NaN if the row has one).

    From what temperature, then top_k, then top_p, then min_p leave: top_p is the mass of what top_k left, its
    last token included, and who is as likely as the last one kept is kept too. Logits are float32, uniform
    numbers float64 in [0, 1). A row whose peak is not finite gives a token that means nothing.
    """
    if logits_SV.is_cuda:
        return launch_draw(cuda_device(logits_SV.device.index), logits_SV, wishes, uniform_S)
    if cpu is not None:
        return cpu.draw(logits_SV, wishes, uniform_S)
    return draw_plainly(logits_SV, wishes, uniform_S)


def draw_plainly(
    logits_SV: torch.Tensor, wishes: Wishes, uniform_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by sorting, in plain torch."""
    peaks_S, likeliest_S = logits_SV.max(dim=-1)
    temperature_S, top_k_S, top_p_S, min_p_S = wishes
    is_greedy_S = (temperature_S == 0) | ~peaks_S.isfinite()
    divisor_S = torch.where(is_greedy_S, 1.0, temperature_S)
    weights_SV = ((logits_SV - peaks_S[:, None]) / divisor_S[:, None]).nan_to_num(nan=0.0).exp()
    kept_SV = _cut(weights_SV, top_k_S.long(), top_p_S, min_p_S).double()
    mass_SV = kept_SV.cumsum(dim=-1)
    target_S1 = uniform_S[:, None] * mass_SV[:, -1:]
    drawn_S = torch.searchsorted(mass_SV, target_S1, right=True).squeeze(1).clamp(max=logits_SV.shape[1] - 1)
    return torch.where(is_greedy_S, likeliest_S, drawn_S), peaks_S


def _cut(
    weights_SV: torch.Tensor, top_k_S: torch.Tensor, top_p_S: torch.Tensor, min_p_S: torch.Tensor
) -> torch.Tensor:
    """The weights that are kept, 0 elsewhere; a row's largest is 1."""
    vocab_size = weights_SV.shape[1]
    ordered_SV = weights_SV.sort(dim=-1, descending=True).values
    limit_S = torch.where(top_k_S > 0, top_k_S, vocab_size).clamp(max=vocab_size)
    least_S1 = torch.where(limit_S[:, None] < vocab_size, ordered_SV.gather(1, limit_S[:, None] - 1), 0.0)
    mass_SV = torch.where(ordered_SV >= least_S1, ordered_SV, 0.0).cumsum(dim=-1, dtype=torch.float64)
    is_needed_SV = mass_SV - ordered_SV < top_p_S[:, None] * mass_SV[:, -1:]
    num_S1 = is_needed_SV.sum(dim=-1, keepdim=True).clamp(min=1)
    nucleus_S1 = torch.where(top_p_S[:, None] < 1, ordered_SV.gather(1, num_S1 - 1), 0.0)
    threshold_S1 = torch.maximum(torch.maximum(least_S1, nucleus_S1), min_p_S[:, None])
    return torch.where(weights_SV >= threshold_S1, weights_SV, 0.0)


def penalise(
    logits_SV: torch.Tensor,
    positions_X: torch.Tensor,
    rows_X: torch.Tensor,
    divisor_NV: torch.Tensor,
    loss_NV: torch.Tensor,
) -> None:
    """In place, logits at `positions_X` with the penalties at `rows_X`: float32, indexes int64.

    A logit above 0 is divided by its divisor, one below is multiplied; then its loss is taken off.
    """
    tables = divisor_NV, loss_NV
    if logits_SV.is_cuda:
        launch_penalise(cuda_device(logits_SV.device.index), logits_SV, positions_X, rows_X, *tables)
    elif cpu is not None:
        cpu.penalise(logits_SV, positions_X, rows_X, *tables)
    else:
        penalise_plainly(logits_SV, positions_X, rows_X, *tables)


def penalise_plainly(
    logits_SV: torch.Tensor,
    positions_X: torch.Tensor,
    rows_X: torch.Tensor,
    divisor_NV: torch.Tensor,
    loss_NV: torch.Tensor,
) -> None:
    """The same in plain torch."""
    picked_XV, divisor_XV = logits_SV[positions_X], divisor_NV[rows_X]
    penalised_XV = torch.where(picked_XV > 0, picked_XV / divisor_XV, picked_XV * divisor_XV)
    logits_SV.index_copy_(0, positions_X, penalised_XV.sub_(loss_NV[rows_X]))


def forbid(logits_SV: torch.Tensor, positions_X: torch.Tensor, masks_XW: torch.Tensor) -> None:
    """In place, minus infinity at `positions_X` where bit v % 32 of word v // 32 is 0; masks are int32."""
    if logits_SV.is_cuda:
        launch_forbid(cuda_device(logits_SV.device.index), logits_SV, positions_X, masks_XW)
    elif cpu is not None:
        cpu.forbid(logits_SV, positions_X, masks_XW)
    else:
        forbid_plainly(logits_SV, positions_X, masks_XW)


def forbid_plainly(logits_SV: torch.Tensor, positions_X: torch.Tensor, masks_XW: torch.Tensor) -> None:
    """The same in plain torch."""
    bits_32 = torch.arange(32, dtype=torch.int32)
    is_allowed_XV = (masks_XW[:, :, None] >> bits_32 & 1).bool().flatten(1)[:, : logits_SV.shape[1]]
    logits_SV[positions_X] = logits_SV[positions_X].masked_fill(~is_allowed_XV, -torch.inf)


def find_likeliest(values_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [R, K], ids int64 [R, K]) of the `count` largest of each row, in order; float32, contiguous."""
    if cpu is not None and not values_RV.is_cuda:
        return cpu.find_likeliest(values_RV, count)
    values_RK, ids_RK = values_RV.topk(count, dim=-1)
    return values_RK, ids_RK


def launch_draw(
    device: Device, logits_SV: torch.Tensor, wishes: Wishes, uniform_S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the kernel, without a look at any number: the host goes on at once."""
    num_rows, width = logits_SV.shape
    check("logits_SV", logits_SV, (num_rows, width), (torch.float32,))
    for name, wish_S in wishes._asdict().items():
        check(name, wish_S, (num_rows,), (torch.int32 if name == "top_k_S" else torch.float32,))
    check("uniform_S", uniform_S, (num_rows,), (torch.float64,))
    token_ids_S = torch.empty(num_rows, dtype=torch.int64, device=logits_SV.device)
    peaks_S = torch.empty(num_rows, device=logits_SV.device)
    # Two warps at least: each turn of a search leaves one's share.
    threads = min(_MAX_THREADS, 32 + -(-width // (32 * _LOGITS_A_THREAD)) * 32)
    arguments: list[Argument] = [logits_SV, *wishes, uniform_S, token_ids_S, peaks_S, width, threads]
    if num_rows:
        shared_bytes = 8 * threads // 32
        grid = num_rows, 1
        device.launch(Variant("sampling"), "draw", grid, threads, shared_bytes, arguments)
    return token_ids_S, peaks_S


def launch_penalise(
    device: Device,
    logits_SV: torch.Tensor,
    positions_X: torch.Tensor,
    rows_X: torch.Tensor,
    divisor_NV: torch.Tensor,
    loss_NV: torch.Tensor,
) -> None:
    """The same by the kernel."""
    num_penalised, width = len(rows_X), logits_SV.shape[1]
    for name, values in (("logits_SV", logits_SV), ("divisor_NV", divisor_NV), ("loss_NV", loss_NV)):
        check(name, values, (None, width), (torch.float32,))
    for name, where_X in (("positions_X", positions_X), ("rows_X", rows_X)):
        check(name, where_X, (num_penalised,), (torch.int64,))
    blocks = -(-width // (_EDIT_THREADS * _LOGITS_A_THREAD))
    arguments: list[Argument] = [logits_SV, positions_X, rows_X, divisor_NV, loss_NV, width, blocks]
    if num_penalised:
        grid = num_penalised, blocks
        device.launch(Variant("sampling"), "penalise", grid, _EDIT_THREADS, 0, arguments)


def launch_forbid(
    device: Device, logits_SV: torch.Tensor, positions_X: torch.Tensor, masks_XW: torch.Tensor
) -> None:
    """The same by the kernel."""
    num_masks, num_words = masks_XW.shape
    width = logits_SV.shape[1]
    check("logits_SV", logits_SV, (None, width), (torch.float32,))
    check("positions_X", positions_X, (num_masks,), (torch.int64,))
    check("masks_XW", masks_XW, (num_masks, -(-width // 32)), (torch.int32,))
    blocks = -(-width // (_EDIT_THREADS * _LOGITS_A_THREAD))
    arguments: list[Argument] = [logits_SV, positions_X, masks_XW, width, num_words, blocks]
    if num_masks:
        device.launch(Variant("sampling"), "forbid", (num_masks, blocks), _EDIT_THREADS, 0, arguments)

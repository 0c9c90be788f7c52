"""What every 2-bit quantizer must beat: a scale and zero point per 64 rows, plain and by GPTQ."""

import torch
from torch import Tensor

GROUP = 64
LEVELS = 3  # 0..3
_CLIPS = torch.linspace(0.4, 1.0, 25).tolist()


def round_to_nearest(weight: Tensor) -> Tensor:
    """Asymmetric 2-bit rounding of [K, N], the best of 25 clips per group and column; the decoded weight."""
    groups = weight.split(GROUP)
    return torch.cat([_round(group, *_grid(group)) for group in groups])


def gptq(weight: Tensor, moment: Tensor, damping: float = 0.01) -> Tensor:
    """GPTQ (Frantar et al. 2022) row by row with the same grids, scales taken from the updated rows."""
    rows = weight.shape[0]
    damped = moment + damping * moment.diagonal().mean() * torch.eye(rows, device=weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True)
    work, decoded = weight.clone(), torch.empty_like(weight)
    for start in range(0, rows, GROUP):
        grid = _grid(work[start : start + GROUP])
        for row in range(start, min(start + GROUP, rows)):
            decoded[row] = _round(work[row : row + 1], *grid)[0]
            error = (work[row] - decoded[row]) / upper[row, row]
            work[row:] -= upper[row, row:].unsqueeze(1) * error
    return decoded


def _grid(group: Tensor) -> tuple[Tensor, Tensor]:
    low, high = group.amin(dim=0).clamp(max=0), group.amax(dim=0).clamp(min=0)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    least = torch.full_like(low, torch.inf)
    for clip in _CLIPS:
        scale = ((high - low) * clip / LEVELS).clamp(min=1e-12)
        zero = (-low * clip / scale).round()
        error = (group - _round(group, scale, zero)).square().sum(dim=0)
        better = error < least
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        least = torch.minimum(error, least)
    return best_scale, best_zero


def _round(rows: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return ((rows / scale + zero).round().clamp(0, LEVELS) - zero) * scale

"""The bit-shift trellis of WINT2T: two bits enter a 16-bit state per weight, arithmetic makes a level of it.

Viterbi's algorithm finds the path whose levels come nearest to a column: of the four states that lead to the
same next ones only the cheapest survives. Shapes: T steps along K, N columns.
"""

from functools import cache

import torch
from torch import Tensor

try:
    from cuda_kernels.formats import trellis_numba
except ImportError:  # without numba torch does the same, slower
    HAS_NUMBA = False
else:
    HAS_NUMBA = True

STATE_BITS, SYMBOL_BITS = 16, 2
NUM_STATES = 1 << STATE_BITS
NUM_TAILS = NUM_STATES >> SYMBOL_BITS  # states that differ only in the symbol that leaves next
# "1MAD" (QTIP, Tseng et al. 2024): the four bytes of state·A + B add up to nearly a Gaussian.
MULTIPLIER, OFFSET = 34038481, 76625530
MEAN = 510  # of the sum of four random bytes
DEVIATION = 147.8
_CHUNK_COLUMNS = 512


def level(state: Tensor) -> Tensor:
    """States 0..65535 to levels -510..510, int64."""
    word = (state.long() * MULTIPLIER + OFFSET) & 0xFFFFFFFF
    return sum(((word >> shift) & 255 for shift in (0, 8, 16, 24)), -MEAN * torch.ones_like(word))


@cache
def levels(device: torch.device) -> Tensor:
    """The level of every state, f32 [65536]."""
    return level(torch.arange(NUM_STATES, device=device)).float()


def states(symbols: Tensor, start: Tensor) -> Tensor:
    """Symbols 0..3 [T, N], entered after the states `start` [N], to the state behind each, int64 [T, N]."""
    found = torch.empty(symbols.shape, dtype=torch.int64, device=symbols.device)
    state = start.long()
    for step, symbol in enumerate(symbols.long()):
        state = (state << SYMBOL_BITS | symbol) & (NUM_STATES - 1)
        found[step] = state
    return found


def viterbi(targets: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    """The symbols, uint8 [T, N], with least Σ weight·(target - level)² from the states `start` on.

    `targets` f32 [T, N] in units of levels, `weights` f32 [T], `start` int64 [N].
    """
    if HAS_NUMBA and targets.device.type == "cpu":
        return trellis_numba.viterbi(targets, weights, start, levels(targets.device))
    pieces = zip(targets.split(_CHUNK_COLUMNS, dim=1), start.split(_CHUNK_COLUMNS), strict=True)
    return torch.cat([_viterbi(piece, weights, begin) for piece, begin in pieces], dim=1)


def _viterbi(targets: Tensor, weights: Tensor, start: Tensor) -> Tensor:
    steps, columns = targets.shape
    value = levels(targets.device)
    cost = torch.full((columns, NUM_STATES), torch.inf, device=targets.device)
    cost.scatter_(1, start.unsqueeze(1), 0.0)
    origins = torch.empty(steps, columns, NUM_TAILS, dtype=torch.uint8, device=targets.device)
    for step in range(steps):
        least, origin = cost.view(columns, 4, NUM_TAILS).min(dim=1)
        origins[step] = origin.to(torch.uint8)
        distance = (targets[step].unsqueeze(1) - value).square_().mul_(weights[step])
        cost = distance.view(columns, NUM_TAILS, 4).add_(least.unsqueeze(2)).view(columns, NUM_STATES)
    return _trace(cost.argmin(dim=1), origins)


def _trace(state: Tensor, origins: Tensor) -> Tensor:
    symbols = torch.empty(origins.shape[:2], dtype=torch.uint8, device=origins.device)
    for step in range(origins.shape[0] - 1, -1, -1):
        symbols[step] = (state & 3).to(torch.uint8)
        tail = state >> SYMBOL_BITS
        origin = origins[step].gather(1, tail.unsqueeze(1)).squeeze(1).long()
        state = tail | origin << (STATE_BITS - SYMBOL_BITS)
    return symbols

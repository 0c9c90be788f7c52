"""How a token is drawn: pure functions of logits, parameters and one uniform number a sequence.

A draw inverts the cumulative distribution, so it needs a single random number, and that number is a hash of
the sequence's seed and the token's position: no generator state, and nothing of the batch, enters it. Every
row's result is a function of that row alone.

S sequences, V vocabulary, cut into K runs of U tokens; W the likeliest tokens looked at, best first.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

# Most nuclei are narrower than the first of these, in tokens; the rows of wider ones are looked at again.
WINDOWS = (64, 512)

_RUN = 128  # tokens

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seeds_S: NDArray[np.uint64], positions_S: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) for each seed and position: two rounds of SplitMix64 (Steele, Lea, Flood 2014)."""
    bits = _mix(_mix(seeds_S + _GOLDEN) ^ (positions_S.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    # 48 bits, so that a product with the total mass always rounds to less than the total.
    return (bits >> np.uint64(16)).astype(np.float64) * 2.0**-48


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def draw_plain(logits_SV: torch.Tensor, temperature_S: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
    """Token ids int64 [S] from softmax(logits / temperature).

    First a run of tokens is found, then the token in it: far fewer sums than all of a large vocabulary's.
    """
    probs_SV = torch.softmax(logits_SV / temperature_S[:, None], dim=-1)
    if missing := -probs_SV.shape[1] % _RUN:
        probs_SV = F.pad(probs_SV, (0, missing))
    probs_SKU = probs_SV.unflatten(1, (-1, _RUN))
    mass_SK = probs_SKU.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    run_S = _invert(mass_SK, uniform_S)
    probs_SU = probs_SKU[torch.arange(len(run_S), device=run_S.device), run_S]
    mass_SU = probs_SU.cumsum(dim=-1, dtype=torch.float64)
    before_S1 = F.pad(mass_SK, (1, 0)).gather(1, run_S[:, None])
    share_S1 = (uniform_S[:, None] * mass_SK[:, -1:] - before_S1) / mass_SU[:, -1:]
    # Less than 1, so that the search always ends on a token that has some mass.
    return run_S * _RUN + _invert(mass_SU, share_S1.squeeze(1).clamp(0, 1 - 2.0**-48))


def draw_filtered(
    logits_SV: torch.Tensor,
    temperature_S: torch.Tensor,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    uniform_S: torch.Tensor,
) -> torch.Tensor:
    """Token ids int64 [S] from what temperature, then top_k, then top_p, then min_p leave.

    top_k = 0 keeps all; top_p is the mass of what top_k left, its last token included.
    """
    scaled_SV = logits_SV / temperature_S[:, None]
    vocab_size = scaled_SV.shape[1]
    args = (top_k_S, top_p_S, min_p_S, uniform_S)
    token_ids_S = torch.zeros(len(scaled_SV), dtype=torch.int64, device=scaled_SV.device)
    left = torch.arange(len(scaled_SV), device=scaled_SV.device)
    for window in (*(width for width in WINDOWS if width < vocab_size), vocab_size):
        of_left = scaled_SV if len(left) == len(scaled_SV) else scaled_SV[left]
        drawn, is_exact = _draw_from_likeliest(of_left, window, *(arg[left] for arg in args))
        token_ids_S[left] = drawn
        left = left[~is_exact]
        if not len(left):
            break
    return token_ids_S


def _draw_from_likeliest(
    scaled_SV: torch.Tensor,
    window: int,
    top_k_S: torch.Tensor,
    top_p_S: torch.Tensor,
    min_p_S: torch.Tensor,
    uniform_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws from the `window` likeliest tokens; also says for which rows no kept token lies beyond them."""
    vocab_size = scaled_SV.shape[1]
    logits_SW, ids_SW = scaled_SV.topk(window, dim=-1)
    # Doubles for the window alone: of all tokens only the total is needed.
    probs_SW = (logits_SW.double() - torch.logsumexp(scaled_SV, dim=-1, keepdim=True)).exp_()
    mass_SW = probs_SW.cumsum(dim=-1)
    limit_S = torch.where(top_k_S > 0, top_k_S, vocab_size)
    last_S = limit_S.clamp(max=window)[:, None] - 1
    top_k_mass_S1 = torch.where(limit_S[:, None] < vocab_size, mass_SW.gather(1, last_S), 1.0)
    is_kept_SW = torch.arange(window, device=scaled_SV.device) < limit_S[:, None]
    is_kept_SW &= mass_SW - probs_SW < top_p_S[:, None] * top_k_mass_S1
    is_kept_SW &= probs_SW >= min_p_S[:, None] * probs_SW[:, :1]
    # The likeliest token always stays, and each rule cuts a tail: what is kept is a prefix.
    num_kept_S = is_kept_SW.sum(dim=-1).clamp(min=1)
    kept_mass_SW = torch.where(is_kept_SW, mass_SW, mass_SW.gather(1, num_kept_S[:, None] - 1))
    ranks_S = _invert(kept_mass_SW, uniform_S)
    is_exact_S = torch.where(limit_S < vocab_size, limit_S <= window, num_kept_S < window)
    return ids_SW.gather(1, ranks_S[:, None]).squeeze(1), is_exact_S


def _invert(mass_SW: torch.Tensor, uniform_S: torch.Tensor) -> torch.Tensor:
    """First index whose cumulative mass exceeds the uniform share of the total, int64 [S]."""
    target_S1 = uniform_S[:, None] * mass_SW[:, -1:]
    return torch.searchsorted(mass_SW, target_S1, right=True).squeeze(1).clamp(max=mass_SW.shape[1] - 1)

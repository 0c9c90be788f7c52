"""Op `rope`: rotary position embedding over interleaved pairs, as ERNIE 4.5 and GPT-J have it.

Features (2i, 2i+1) of a head rotate together by the angle position · theta^(-2i/C).
Shapes: T tokens, H query heads, G KV heads, C head dim, P positions.
"""

from __future__ import annotations

import torch


def cos_sin_table(
    num_positions: int, head_dim: int, theta: float, *, compression_ratio: float = 1.0
) -> torch.Tensor:
    """cos (first half) and sin (second half) of every angle: [P, C] float32.

    Position p stands for p / compression_ratio (ERNIE 4.5's config key).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    inverse_frequencies = 1.0 / theta**exponents
    positions = torch.arange(num_positions, dtype=torch.float32) / compression_ratio
    angles = torch.outer(positions, inverse_frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope(
    query_THC: torch.Tensor, key_TGC: torch.Tensor, positions_T: torch.Tensor, cos_sin_PC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys to their positions; computed in float32, returned in the inputs' dtypes.

    The inputs must not be used afterwards: an implementation may rotate in place.
    """
    cos, sin = cos_sin_PC[positions_T].unsqueeze(1).chunk(2, dim=-1)
    # Products and sums apart, where a complex product would fuse them for some layouts only and change bits.
    cos_of_pair, sin_of_pair = torch.stack((cos, cos), dim=-1), torch.stack((-sin, sin), dim=-1)
    return _rotate(query_THC, cos_of_pair, sin_of_pair), _rotate(key_TGC, cos_of_pair, sin_of_pair)


def _rotate(x_THC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs: torch.Tensor = x_THC.float().unflatten(-1, (-1, 2))
    return (pairs * cos + pairs.flip(-1) * sin).flatten(-2).to(x_THC.dtype)

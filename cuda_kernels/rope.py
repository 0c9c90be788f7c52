"""Op `rope`: rotary position embedding over interleaved pairs, as ERNIE 4.5 and GPT-J have it.

Features (2i, 2i+1) of a head rotate together by the angle position · theta^(-2i/C).
Shapes: T tokens, H query heads, G KV heads, C head dim, P positions.
"""

from __future__ import annotations

import torch

from cuda_kernels.build import Variant
from cuda_kernels.compiled import cpu, has_compiled
from cuda_kernels.launch import Argument, Device, cuda_device

_VECTOR, _THREADS = 8, 256  # as in csrc/rope.cu


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
    if query_THC.is_cuda and query_THC.dtype == torch.bfloat16 and query_THC.shape[-1] % _VECTOR == 0:
        launch_rope(cuda_device(query_THC.device.index), query_THC, key_TGC, positions_T, cos_sin_PC)
        return query_THC, key_TGC
    if has_compiled(query_THC):
        for heads in (query_THC, key_TGC):
            cpu.rope(heads, positions_T, cos_sin_PC)
        return query_THC, key_TGC
    cos, sin = cos_sin_PC[positions_T].unsqueeze(1).chunk(2, dim=-1)
    # Products and sums apart, where a complex product would fuse them for some layouts only and change bits.
    cos_of_pair, sin_of_pair = torch.stack((cos, cos), dim=-1), torch.stack((-sin, sin), dim=-1)
    return _rotate(query_THC, cos_of_pair, sin_of_pair), _rotate(key_TGC, cos_of_pair, sin_of_pair)


def _rotate(x_THC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    pairs: torch.Tensor = x_THC.float().unflatten(-1, (-1, 2))
    return (pairs * cos + pairs.flip(-1) * sin).flatten(-2).to(x_THC.dtype)


def launch_rope(
    device: Device,
    query_THC: torch.Tensor,
    key_TGC: torch.Tensor,
    positions_T: torch.Tensor,
    cos_sin_PC: torch.Tensor,
) -> None:
    """The same by the kernel, in place; a token's heads lie side by side, tokens at any distance."""
    num_tokens, num_heads, head_dim = query_THC.shape
    query_vectors = num_heads * head_dim // _VECTOR
    vectors = query_vectors + key_TGC.shape[1] * head_dim // _VECTOR
    strides = [query_THC.stride(0) // _VECTOR, key_TGC.stride(0) // _VECTOR]
    arguments: list[Argument] = [
        query_THC,
        key_TGC,
        positions_T,
        cos_sin_PC,
        *strides,
        query_vectors,
        vectors,
        head_dim,
    ]
    if num_tokens:
        grid = num_tokens, -(-vectors // _THREADS)
        device.launch(Variant("rope"), "rope", grid, _THREADS, 0, arguments, overlaps=True)

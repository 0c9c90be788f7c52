"""Inputs of the WINT2 expert op: stored weights, ordinary and extreme, and routed tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_kernels.formats.layout import KOrder
from cuda_kernels.formats.wint2t import Wint2tWeight
from cuda_kernels.packing import PackedWint2, pack_wint2
from cuda_kernels.tiled import TiledWeight, pack_trellis


@dataclass(frozen=True)
class Layer:
    """One layer's expert projections and the tokens sent to them."""

    hidden: Tensor
    expert_ids: Tensor
    expert_weights: Tensor
    up_gate: PackedWint2
    down: PackedWint2

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, PackedWint2, PackedWint2]:
        return self.hidden, self.expert_ids, self.expert_weights, self.up_gate, self.down


def code_parameters(kind: str, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """code_scale and code_zp: any real numbers, on the grid of 1/128, or where no integers are exact.

    Every other 32 of the extreme ones are a thousand times as large.
    """
    match kind:
        case "grid":
            return torch.randint(64 * 128, 127 * 128, shape) / 128, torch.randint(0, 128000, shape) / 128
        case "extreme":
            size = 1000.0 ** (torch.arange(shape[-1]) // 32 % 2)
            return size * (torch.rand(shape) * 30000 - 15000), torch.rand(shape) * 60000 - 30000
    return torch.rand(shape) * 64.5 + 64, torch.rand(shape) * 1000


def packed(
    num_experts: int, num_rows: int, num_columns: int, *, is_gated: bool, kind: str, k_order: KOrder
) -> PackedWint2:
    """Random stored weights, packed; `num_rows` is padded to whole steps of K."""
    rows = -(-num_rows // 128) * 128
    code_scale, code_zp = code_parameters(kind, (num_experts, num_columns))
    return pack_wint2(
        torch.randint(0, 256, (num_experts, rows // 4, num_columns), dtype=torch.uint8),
        torch.randint(0, 256, (num_experts, rows // 128, num_columns), dtype=torch.uint8),
        (torch.rand(num_experts, num_columns) * 1e-3 + 1e-4).bfloat16(),
        code_scale,
        code_zp,
        is_gated=is_gated,
        k_order=k_order,
    )


def layer(
    num_tokens: int,
    num_experts: int,
    experts_per_token: int,
    width: int,
    features: int,
    *,
    kind: str = "any",
    k_order: KOrder = "shuffled",
    seed: int = 0,
) -> Layer:
    """A layer of `num_experts` experts, `width` = D, `features` = F."""
    torch.manual_seed(seed)
    ids = [torch.randperm(num_experts)[:experts_per_token] for _ in range(num_tokens)]
    return Layer(
        torch.randn(num_tokens, width).bfloat16(),
        torch.stack(ids).int() if ids else torch.empty(0, experts_per_token, dtype=torch.int32),
        torch.rand(num_tokens, experts_per_token),
        packed(num_experts, width, 2 * features, is_gated=True, kind=kind, k_order=k_order),
        packed(num_experts, features, width, is_gated=False, kind=kind, k_order=k_order),
    )


def trellis(num_inputs: int, num_outputs: int) -> Wint2tWeight:
    """A WINT2T weight of any bits; `num_inputs` is padded to whole chunks of K."""
    rows = -(-num_inputs // 128) * 128
    return Wint2tWeight(
        torch.randint(0, 256, (rows // 4, num_outputs), dtype=torch.uint8),
        torch.randint(0, 256, (rows // 128, num_outputs), dtype=torch.uint8),
        ((torch.rand(num_outputs) + 0.1) * 1e-3 * num_inputs**-0.5).bfloat16(),
    )


def packed_trellis(num_outputs: int, num_inputs: int, is_gated: bool = False) -> TiledWeight:
    """The same, packed."""
    stored = trellis(num_inputs, num_outputs)
    return pack_trellis(**stored.tensors(), num_inputs=num_inputs, is_gated=is_gated)

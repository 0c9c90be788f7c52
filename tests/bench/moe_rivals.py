"""What the WINT2 expert op is timed beside: this project's own op for WINT4, torch's int4 and its bfloat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from cuda_kernels.tiled import TiledWeight
from cuda_kernels.tiled_linear import moe_tiled

Int4Expert = tuple[tuple[Tensor, Tensor], ...]  # (packed codes, scales) of up and gate, of down
MAX_INT4_TOKENS = 128
LAYERS = 2  # of weights, which calls take in turn


@dataclass(frozen=True)
class Shape:
    """One MoE layer: D hidden, F intermediate, E experts, A experts a token."""

    hidden: int
    intermediate: int
    num_experts: int
    experts_per_token: int

    @property
    def expert_weights(self) -> int:
        return 3 * self.hidden * self.intermediate


SHAPES = {"300b": Shape(8192, 3584, 64, 8), "21b": Shape(2560, 1536, 64, 6)}


@dataclass(frozen=True)
class Routing:
    """Rows of tokens for experts."""

    ids_TA: Tensor
    weights_TA: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.ids_TA, self.weights_TA

    @property
    def used(self) -> list[int]:
        return self.ids_TA.unique().tolist()


Prepare = Callable[[Tensor, Routing], Callable[[], object]]


@dataclass(frozen=True)
class Contender:
    """A way to compute the layer: `prepare(hidden, routing)` gives what is timed."""

    name: str
    bytes_per_expert: float
    max_tokens: int
    prepare: Prepare


def in_turn(ways: list[Prepare]) -> Prepare:
    """A call after another by the next of `ways`."""
    turns = cycle(ways)
    return lambda hidden, routing: next(turns)(hidden, routing)


def wint4_contender(shape: Shape) -> Contender:
    layers = [random_tiled_layer(shape) for _ in range(LAYERS)]
    size = sum(weight.nbytes for weight in layers[0]) / shape.num_experts
    return Contender("wint4", size, MAX_INT4_TOKENS, in_turn([wint4_run(layer) for layer in layers]))


def wint4_run(layer: tuple[TiledWeight, TiledWeight]) -> Prepare:
    return lambda hidden, routing: lambda: moe_tiled(hidden, routing.ids_TA, routing.weights_TA, *layer)


def random_tiled_layer(shape: Shape) -> tuple[TiledWeight, TiledWeight]:
    up_gate = random_tiled(shape.hidden, 2 * shape.intermediate, shape.num_experts, is_gated=True)
    return up_gate, random_tiled(shape.intermediate, shape.hidden, shape.num_experts, is_gated=False)


def random_tiled(num_inputs: int, num_outputs: int, num_experts: int, *, is_gated: bool) -> TiledWeight:
    """WINT4 levels in the kernel's layout."""
    shape = num_experts, num_outputs // 32, num_inputs // 64, 2, 32, 16
    tiles = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    scales = torch.rand(*shape[:2], 2, 16, device="cuda") * 1e-3
    return TiledWeight(tiles, scales, 4, num_inputs, num_outputs, is_gated)


def int4_contender(shape: Shape) -> Contender:
    sizes = (shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden)
    layers = [[tuple(int4(*size) for size in sizes) for _ in range(shape.num_experts)] for _ in range(LAYERS)]
    size = shape.expert_weights * (0.5 + 4 / 128)
    return Contender("torch int4", size, MAX_INT4_TOKENS, in_turn([partial(int4_run, of) for of in layers]))


def int4(num_rows: int, num_columns: int) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 256, (num_columns, num_rows // 2), dtype=torch.uint8, device="cuda")
    scales = torch.rand(num_rows // 128, num_columns, 2, device="cuda").bfloat16() * 1e-2
    return torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales


def int4_run(experts: Sequence[Int4Expert], hidden: Tensor, routing: Routing) -> Callable[[], object]:
    rows = [(e, (routing.ids_TA == e).nonzero(as_tuple=True)) for e in routing.used]

    def run() -> Tensor:
        out = torch.zeros_like(hidden)
        for expert, (token, slot) in rows:
            (up_gate, up_scales), (down, down_scales) = experts[expert]
            both = torch.ops.aten._weight_int4pack_mm(hidden[token], up_gate, 128, up_scales)
            y = torch.ops.aten._weight_int4pack_mm(swiglu(both), down, 128, down_scales)
            out.index_add_(0, token, y * routing.weights_TA[token, slot].unsqueeze(1).bfloat16())
        return out

    return run


def bfloat_contender(shape: Shape) -> Contender:
    sizes = (shape.hidden, 2 * shape.intermediate), (shape.intermediate, shape.hidden)
    layers = [
        [torch.randn(shape.num_experts, n, k, device="cuda", dtype=torch.bfloat16) * 0.01 for k, n in sizes]
        for _ in range(LAYERS)
    ]
    ways: list[Prepare] = [partial(bfloat_run, weights, shape.num_experts) for weights in layers]
    return Contender("torch bfloat", 2.0 * shape.expert_weights, 2**20, in_turn(ways))


def bfloat_run(
    weights: list[Tensor], num_experts: int, hidden: Tensor, routing: Routing
) -> Callable[[], object]:
    order = routing.ids_TA.flatten().argsort(stable=True)
    token = order // routing.ids_TA.shape[1]
    counts = torch.bincount(routing.ids_TA.flatten().long(), minlength=num_experts)
    ends = counts.cumsum(0).int()
    factors = routing.weights_TA.flatten()[order].unsqueeze(1).bfloat16()

    def run() -> Tensor:
        both = torch._grouped_mm(hidden[token], weights[0].transpose(1, 2), offs=ends)
        y = torch._grouped_mm(swiglu(both), weights[1].transpose(1, 2), offs=ends)
        return torch.zeros_like(hidden).index_add_(0, token, y * factors)

    return run


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up

"""Weights laid out for the CPU kernels: panels of 64 columns, in the format in which they are stored.

A weight [K, N] becomes ceil(N / 64) panels, one after another, columns filled up with zeros. Inside a panel
64 columns lie side by side:

    float32, bfloat16   K rows of 64 elements
    narrow              K rows of 16 float32: all there is of a weight of so few columns, as a router's
    wint8               K/4 rows of 64 × 4 bytes: a column's levels of k = 4r .. 4r+3, + 128
    wint4               K/8 rows of 64 × 4 bytes: k = 8r .. 8r+3 in the low nibbles, the next four in the high
                            ones, + 8
    wint2               64 f32 code_scale | 64 f32 code_zp + 0.5 | pairs of 64-groups:
                            64 bytes of local scales, even group in the high nibble
                            16 rows of 64 bytes for each group: byte row r is slots 4r .. 4r+3

Quantized K is filled up to whole groups of 64. WINT2's K counts slots; x is brought to the order of the slots
before it is multiplied.
Shapes: K inputs, N outputs, J panels, D hidden, F expert intermediate, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F

from cuda_kernels.cpu.arena import weight_arena
from cuda_kernels.formats.layout import GROUP_SIZE, KOrder, slot_rows
from cuda_kernels.formats.wint2 import Wint2Weight
from cuda_kernels.formats.wint4 import Wint4Weight
from cuda_kernels.formats.wint8 import Wint8Weight

PANEL = 64
CODE_ROWS = GROUP_SIZE // 4

NARROW = 16

Format = Literal["float32", "narrow", "bfloat16", "wint8", "wint4", "wint2"]
DotName = Literal["wint8_dot", "wint4_dot", "wint2_dot"]
KernelName = Format | DotName | Literal["scattered"]
Activations = Literal["float32", "int8"]


@dataclass(frozen=True, eq=False)
class PanelWeight:
    """A weight in panels: bytes [J, panel bytes], and float32 [J · 64] column scales where it has them.

    Panels may lie apart.
    """

    format: Format
    data_JB: torch.Tensor
    scale_N: torch.Tensor | None
    num_inputs: int
    num_outputs: int
    num_k: int  # values of x that a panel is multiplied with: K, and what fills up its last group
    activations: Activations = "float32"  # what x is multiplied as

    @property
    def kernel(self) -> KernelName:
        """Integers are multiplied with integers; floats stay what they are."""
        match self.format, self.activations:
            case ("wint8", "int8"):
                return "wint8_dot"
            case ("wint4", "int8"):
                return "wint4_dot"
            case ("wint2", "int8"):
                return "wint2_dot"
        return self.format

    @property
    def quantizes(self) -> bool:
        """Whether x is brought to 8 bits."""
        return self.kernel != self.format

    @property
    def num_panels(self) -> int:
        return self.data_JB.shape[0]

    @property
    def panel_stride(self) -> int:
        """Bytes from one panel to the next."""
        return self.data_JB.stride(0)

    @property
    def nbytes(self) -> int:
        return self.data_JB.nbytes + (0 if self.scale_N is None else self.scale_N.nbytes)

    @cached_property
    def addresses(self) -> tuple[int, int]:
        """Of the panels and of the scales, 0 without."""
        return self.data_JB.data_ptr(), 0 if self.scale_N is None else self.scale_N.data_ptr()

    @cached_property
    def panels(self) -> tuple[int, int, int]:
        """The address of the first, the bytes from one to the next, how many."""
        return self.addresses[0], self.panel_stride, self.num_panels

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """Values of x, bytes from one panel to the next, panels."""
        return self.num_k, self.panel_stride, self.num_panels


@dataclass(frozen=True, slots=True, eq=False)
class PanelExpert:
    """One expert, or a dense feed-forward network: gate and up [D, F], down [F, D]."""

    gate: PanelWeight
    up: PanelWeight
    down: PanelWeight

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes


@dataclass(frozen=True, eq=False)
class PanelExperts:
    """Experts of equal formats and sizes, and their addresses for the compiled driver, `table` int64 [E, 6].

    `input_order` brings a hidden state to the order of the weights' K, `slots` 64 hidden features to that of
    down's; int64, the first empty where x serves as it is.
    """

    experts: tuple[PanelExpert, ...]
    table: torch.Tensor
    input_order: torch.Tensor
    slots: torch.Tensor

    @property
    def nbytes(self) -> int:
        return sum(expert.nbytes for expert in self.experts)

    @cached_property
    def tables(self) -> tuple[int, int, int, int, int]:
        """Address and length of the table and of the input order, address of the slots."""
        order = self.input_order
        return self.table.data_ptr(), len(self.table), order.data_ptr(), len(order), self.slots.data_ptr()


def settle(weight: PanelWeight) -> PanelWeight:
    """The weight in the memory where it stays."""
    return _settle(weight, weight_arena().empty(*weight.data_JB.shape))


def _settle(weight: PanelWeight, place_JB: torch.Tensor) -> PanelWeight:
    scale = None if weight.scale_N is None else weight_arena().copy(weight.scale_N)
    return replace(weight, data_JB=place_JB.copy_(weight.data_JB), scale_N=scale)


def stack_experts(experts: Sequence[PanelExpert], k_order: KOrder) -> PanelExperts:
    """Experts of equal shapes in the memory where they stay; `k_order` is that of the WINT2 weights."""
    settled = _settle_experts(experts)
    rows = [(*e.gate.addresses, *e.up.addresses, *e.down.addresses) for e in settled]
    gate, down = experts[0].gate, experts[0].down
    needs_order = gate.format == "wint2" or gate.num_k != gate.num_inputs
    input_order = _order(gate, k_order) if needs_order else torch.empty(0, dtype=torch.int64)
    slots = slot_rows(PANEL, k_order) if down.format == "wint2" else torch.arange(PANEL)
    return PanelExperts(settled, torch.tensor(rows), input_order, slots)


def _settle_experts(experts: Sequence[PanelExpert]) -> tuple[PanelExpert, ...]:
    """As they are read: a panel of gate with that of up, and panel by panel all experts' down."""
    gate_JB, down_JB = experts[0].gate.data_JB, experts[0].down.data_JB
    inner_EJ2B = weight_arena().empty(len(experts), len(gate_JB), 2, gate_JB.shape[1])
    down_JEB = weight_arena().empty(len(down_JB), len(experts), down_JB.shape[1])
    return tuple(
        PanelExpert(
            _settle(expert.gate, inner_EJ2B[index, :, 0]),
            _settle(expert.up, inner_EJ2B[index, :, 1]),
            _settle(expert.down, down_JEB[:, index]),
        )
        for index, expert in enumerate(experts)
    )


def _order(weight: PanelWeight, k_order: KOrder) -> torch.Tensor:
    return slot_rows(weight.num_k, k_order) if weight.format == "wint2" else torch.arange(weight.num_k)


def pack_dense(weight_NK: torch.Tensor) -> PanelWeight:
    """A float32 or bfloat16 weight [N, K]."""
    name: Format = "bfloat16" if weight_NK.dtype == torch.bfloat16 else "float32"
    return _pack(name, weight_NK.T, None, weight_NK.shape[1])


def pack_narrow(weight_NK: torch.Tensor) -> PanelWeight:
    """A float32 weight of up to 16 outputs, for `linear`."""
    num_outputs, num_inputs = weight_NK.shape
    rows_KN = F.pad(weight_NK.T, (0, NARROW - num_outputs)).contiguous()
    return PanelWeight(
        "narrow", rows_KN.view(torch.uint8).view(1, -1), None, num_inputs, num_outputs, num_inputs
    )


def pack_wint8(weight: Wint8Weight, num_inputs: int) -> PanelWeight:
    """`num_inputs` is K without the padding of the stored weight."""
    # Of a level in two's complement and 128, the sum.
    levels = _to_groups(weight.quant_weight[:num_inputs]).view(torch.uint8) ^ 128
    return _levels("wint8", _in_fours(levels), weight.weight_scale, num_inputs)


def pack_wint4(weight: Wint4Weight, num_inputs: int) -> PanelWeight:
    fours = _in_fours((_to_groups(weight.quant_weight[:num_inputs]) + 8).view(torch.uint8))
    return _levels("wint4", fours[0::2] | fours[1::2] << 4, weight.weight_scale, num_inputs)


def pack_wint2(weight: Wint2Weight, num_inputs: int) -> PanelWeight:
    num_columns = weight.shape[1]
    num_groups = -(-num_inputs // GROUP_SIZE)
    parameters = _panels(torch.stack((weight.code_scale, weight.code_zp + 0.5)))
    scales = _panels(weight.weight_scale).view(-1, weight.weight_scale.shape[0], 1, PANEL)
    codes = _panels(weight.quant_weight).view(len(scales), -1, 2 * CODE_ROWS, PANEL)
    pairs = torch.cat((scales, codes), dim=2).flatten(1)
    if num_groups % 2:
        pairs = pairs[:, : -CODE_ROWS * PANEL]
    data = torch.cat((parameters.view(torch.uint8).flatten(1), pairs), dim=1)
    scale = _column_scale(weight.super_scales)
    return PanelWeight("wint2", data, scale, num_inputs, num_columns, num_groups * GROUP_SIZE)


def _pack(name: Format, rows_KN: torch.Tensor, scale_N: torch.Tensor | None, num_inputs: int) -> PanelWeight:
    scale = None if scale_N is None else _column_scale(scale_N)
    data = _panels(rows_KN).view(torch.uint8).flatten(1)
    return PanelWeight(name, data, scale, num_inputs, rows_KN.shape[1], num_inputs)


def _to_groups(levels_KN: torch.Tensor) -> torch.Tensor:
    padded: torch.Tensor = F.pad(levels_KN, (0, 0, 0, -levels_KN.shape[0] % GROUP_SIZE))
    return padded


def _in_fours(levels_KN: torch.Tensor) -> torch.Tensor:
    """[K, N] bytes to [K / 4, N, 4]."""
    fours: torch.Tensor = levels_KN.unflatten(0, (-1, 4))
    return fours.transpose(1, 2)


def _levels(name: Format, words_RN4: torch.Tensor, scale_N: torch.Tensor, num_inputs: int) -> PanelWeight:
    words_RN = words_RN4.contiguous().view(torch.int32).squeeze(-1)
    packed = _pack(name, words_RN, scale_N, num_inputs)
    return replace(packed, num_k=-(-num_inputs // GROUP_SIZE) * GROUP_SIZE)


def _panels(rows_KN: torch.Tensor) -> torch.Tensor:
    """[K, N] -> [J, K, 64], owning its memory."""
    missing = -rows_KN.shape[1] % PANEL
    panels: torch.Tensor = F.pad(rows_KN, (0, missing)).unflatten(1, (-1, PANEL))
    return panels.transpose(0, 1).contiguous()


def _column_scale(scale_N: torch.Tensor) -> torch.Tensor:
    return F.pad(scale_N.float(), (0, -len(scale_N) % PANEL))

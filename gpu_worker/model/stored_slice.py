"""A part of a stored projection, for one rank of a tensor-parallel group: exact, nothing is quantized anew.

    checkpoint                 part of the outputs             part of the inputs
    whole                      columns of every tensor         rows; the channels' scales stay whole
    ranks that cut outputs     columns of the ranks together   rows
    ranks that cut inputs      columns                         rows of one rank, whose scales are its own

WINT2's rows are cut between 64-groups. Two groups' local scales share a byte: an odd number of groups gets
one more, whose local scales are zero. A part that spans ranks with scales of their own exists only decoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cuda_kernels.formats import wint4, wint8
from cuda_kernels.formats.layout import GROUP_SIZE, KOrder, pad_rows
from gpu_worker.config import QuantFormat
from gpu_worker.model.stored_weight import StoredLinear, StoredVector, dequantize

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSlice(StoredLinear):
    """The `outputs` of each of the source's sections, and its `inputs`."""

    source: StoredLinear
    outputs: tuple[range, ...]
    inputs: range

    @property
    def is_one_weight(self) -> bool:
        return self.format in ("wint2", "wint4", "wint8") and self._holder() is not None

    @property
    def stored_bytes(self) -> int:
        """The part's share of the source's bytes."""
        source = self.source
        shares = self.num_outputs * self.num_inputs, source.num_outputs * source.num_inputs
        return source.stored_bytes * shares[0] // shares[1]

    def read(self, rank: int = 0) -> dict[str, torch.Tensor]:
        holder = self._holder()
        if holder is None:
            raise ValueError(f"{self.name}: the part spans ranks with scales of their own")
        file_rank, rows = holder
        is_joined = self.source.cut == "outputs" and len(self.source.ranks) > 1
        whole = self._join() if is_joined else self.source.read(file_rank)
        return cut_rows(self.format, cut_columns(self.format, whole, self._columns(is_joined)), rows)

    def dense(self, k_order: KOrder = "shuffled") -> torch.Tensor:
        if self.is_one_weight:
            return dequantize(self.format, self.read(), k_order)[: self.num_inputs].T
        weight_NK = self.source.dense(k_order)
        return weight_NK[self._columns(is_joined=False)][:, self.inputs.start : self.inputs.stop]

    def _holder(self) -> tuple[int, range] | None:
        """The rank whose file has all the inputs, and which of its rows they are; None if there is none."""
        source = self.source
        num_files = len(source.ranks) if source.cut == "inputs" else 1
        num_rows = source.num_inputs // num_files
        rank = self.inputs.start // num_rows
        rows = range(self.inputs.start - rank * num_rows, self.inputs.stop - rank * num_rows)
        unit = GROUP_SIZE if self.format == "wint2" else 1
        is_between = rows.start % unit == 0 and (rows.stop % unit == 0 or rows.stop == num_rows)
        return (rank, rows) if is_between and rows.stop <= num_rows else None

    def _join(self) -> dict[str, torch.Tensor]:
        files = [canonical(self.format, self.source.read(rank)) for rank in range(len(self.source.ranks))]
        joined = {name: torch.cat([one[name] for one in files], dim=-1) for name in files[0]}
        return stored(self.format, joined)

    def _columns(self, is_joined: bool) -> torch.Tensor:
        """Where the outputs are, in a whole weight or in one whose ranks were put side by side."""
        num_files = len(self.source.ranks) if is_joined else 1
        begin, columns = 0, []
        for section, part in zip(self.source.sections, self.outputs, strict=True):
            rank_size = section // num_files
            at = torch.arange(part.start, part.stop)
            columns.append(at // rank_size * (self.source.num_outputs // num_files) + begin + at % rank_size)
            begin += rank_size
        return torch.cat(columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorSlice(StoredVector):
    """Some of a vector's features, or of a matrix's rows."""

    parts: tuple[range, ...]
    part_bytes: int

    @property
    def stored_bytes(self) -> int:
        return self.part_bytes

    def dense(self) -> torch.Tensor:
        whole = StoredVector.dense(self)
        return torch.cat([whole[part.start : part.stop] for part in self.parts])


def slice_vector(source: StoredVector, parts: tuple[range, ...], size: int) -> VectorSlice:
    """`parts` of the source's `size` features."""
    return VectorSlice(
        name=source.name,
        kind=source.kind,
        ranks=source.ranks,
        cut=source.cut,
        halves=source.halves,
        parts=parts,
        part_bytes=source.stored_bytes * sum(map(len, parts)) // size,
    )


def slice_linear(source: StoredLinear, outputs: tuple[range, ...], inputs: range) -> StoredSlice:
    return StoredSlice(
        name=source.name,
        kind=source.kind,
        format=source.format,
        is_in_out=source.is_in_out,
        num_inputs=len(inputs),
        sections=tuple(map(len, outputs)),
        cut="none",
        ranks=source.ranks,
        source=source,
        outputs=outputs,
        inputs=inputs,
    )


def cut_columns(
    quant_format: QuantFormat, tensors: Tensors, columns: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Some of the outputs of a stored weight."""
    levels = canonical(quant_format, tensors)
    return stored(
        quant_format, {name: tensor[..., columns.to(tensor.device)] for name, tensor in levels.items()}
    )


def cut_rows(quant_format: QuantFormat, tensors: Tensors, rows: range) -> dict[str, torch.Tensor]:
    """Some of the inputs of a stored weight; WINT2's begin between groups."""
    if quant_format != "wint2":
        levels = canonical(quant_format, tensors)
        cut = pad_rows(levels["quant_weight"][rows.start : rows.stop], GROUP_SIZE)
        return stored(quant_format, levels | {"quant_weight": cut})
    begin, end = rows.start, -(-rows.stop // GROUP_SIZE) * GROUP_SIZE
    local = _local_scales(tensors["weight_scale"])[begin // GROUP_SIZE : end // GROUP_SIZE]
    codes = tensors["quant_weight"][begin // 4 : end // 4]
    if len(local) % 2:
        local = F.pad(local, (0, 0, 0, 1))
        codes = F.pad(codes, (0, 0, 0, GROUP_SIZE // 4))
    scales = local[0::2] << 4 | local[1::2]
    return dict(tensors) | {"quant_weight": codes.contiguous(), "weight_scale": scales}


def canonical(quant_format: QuantFormat, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The tensors with outputs along the last axis: WINT4 and WINT8 unpacked to levels [K, N]."""
    if quant_format == "wint2":
        return dict(tensors)
    unpack = wint4.unpack if quant_format == "wint4" else wint8.unpack
    return dict(tensors) | {"quant_weight": unpack(tensors["quant_weight"].view(torch.int8))}


def stored(quant_format: QuantFormat, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The inverse of `canonical`."""
    if quant_format == "wint2":
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    pack = wint4.pack if quant_format == "wint4" else wint8.pack
    return dict(tensors) | {"quant_weight": pack(tensors["quant_weight"].contiguous())}


def _local_scales(weight_scale: torch.Tensor) -> torch.Tensor:
    """[K/128, N] bytes to [K/64, N] nibbles."""
    return torch.stack([weight_scale >> 4, weight_scale & 15], dim=1).flatten(0, 1)

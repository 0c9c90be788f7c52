"""A weight as a checkpoint stores it: what its tensors must be, and how to read it as a dense one.

    format    tensors of a projection with K inputs and N outputs
    none      weight [N, K] or, from Paddle, [K, N]; Hugging Face splits q|k|v and gate|up into several
    wint8     quant_weight int8 [N, K], weight_scale [N]
    wint4     quant_weight int8 [N/2, K], weight_scale [N]
    wint2     quant_weight uint8 [K/4, N], weight_scale uint8 [K/128, N], super_scales [N], code_scale [N],
              code_zp [N]
    wint2t    quant_weight uint8 [K/4, N], weight_scale uint8 [K/128, N], super_scales [N]

Where K is no multiple of 64 (WINT8, WINT4) or 128 (WINT2) it is padded with zero rows; the padding ends here.
In a checkpoint cut for tensor parallelism every rank holds such a weight of its part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from cuda_kernels.formats import wint2, wint2t, wint4, wint8
from cuda_kernels.formats.layout import GROUP_SIZE, ROW_MULTIPLE, KOrder
from gpu_worker.config import QuantFormat
from gpu_worker.model.safetensors_file import StoredTensor

# Which axis the ranks of a tensor-parallel checkpoint cut: outputs, inputs, or none (each holds all).
Cut = Literal["outputs", "inputs", "none"]

# What a weight is in the model: the lines of a memory table.
Kind = Literal["embedding", "attention", "dense MLP", "router", "experts", "shared experts", "norms", "head"]

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Expected:
    """What a tensor of the checkpoint must be."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RotaryHalves:
    """The first `num_rows` rows are heads with all first members of their rotary pairs, then all second ones;
    the decoder wants the pairs side by side."""

    head_dim: int
    num_rows: int

    def pair(self, rows: torch.Tensor) -> torch.Tensor:
        heads = rows[: self.num_rows].unflatten(0, (-1, 2, self.head_dim // 2))
        return torch.cat([heads.transpose(1, 2).flatten(0, 2), rows[self.num_rows :]])


@dataclass(frozen=True, slots=True)
class StoredVector:
    """A norm weight, bias, or embedding: full precision, the same in both layouts but for its parts."""

    name: str
    kind: Kind
    ranks: tuple[StoredTensor, ...]
    cut: Cut = "none"
    halves: RotaryHalves | None = None

    @property
    def format(self) -> QuantFormat:
        return "none"

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.ranks)

    def release(self) -> None:
        """Let go of what reading has brought into memory."""
        for tensor in self.ranks:
            tensor.release()

    def dense(self) -> torch.Tensor:
        parts = [tensor.read() for tensor in (self.ranks if self.cut != "none" else self.ranks[:1])]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.halves.pair(whole) if self.halves else whole


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """A projection of K inputs to N outputs; `sections` are the outputs fused in it (q, k, v or gate, up)."""

    name: str
    kind: Kind
    format: QuantFormat
    is_in_out: bool  # a full-precision weight lies [K, N]
    num_inputs: int
    sections: tuple[int, ...]
    cut: Cut
    ranks: tuple[Mapping[str, StoredTensor], ...]  # by suffix, or by part where one section is a tensor
    halves: RotaryHalves | None = None

    @property
    def num_outputs(self) -> int:
        return sum(self.sections)

    @property
    def stored_bytes(self) -> int:
        return sum(tensor.nbytes for rank in self.ranks for tensor in rank.values())

    @property
    def is_one_weight(self) -> bool:
        """Whether `read` gives all of it, with one set of scales."""
        return len(self.ranks) == 1

    def read(self, rank: int = 0) -> dict[str, torch.Tensor]:
        """One rank's tensors as stored, by suffix."""
        return {suffix: tensor.read() for suffix, tensor in self.ranks[rank].items()}

    def release(self) -> None:
        """Let go of what reading has brought into memory."""
        for rank in self.ranks:
            for tensor in rank.values():
                tensor.release()

    def dense(self, k_order: KOrder = "shuffled") -> torch.Tensor:
        """The whole projection, [N, K] in its stored precision (bf16 where quantized)."""
        parts = [self._dense_rank(rank, k_order) for rank in range(len(self.ranks))]
        if len(parts) == 1 or self.cut == "none":
            return parts[0]
        if self.cut == "inputs":
            return torch.cat(parts, dim=1)
        by_rank = [part.split([section // len(parts) for section in self.sections]) for part in parts]
        return torch.cat([part for section in zip(*by_rank, strict=True) for part in section])

    def _dense_rank(self, rank: int, k_order: KOrder) -> torch.Tensor:
        read = self.read(rank)
        if self.format == "none":
            parts = [part.T if self.is_in_out else part for part in read.values()]
            whole = torch.cat(parts) if len(parts) > 1 else parts[0]
            return self.halves.pair(whole) if self.halves else whole
        num_inputs = self.num_inputs // (len(self.ranks) if self.cut == "inputs" else 1)
        return dequantize(self.format, read, k_order)[:num_inputs].T


def dequantize(
    quant_format: QuantFormat, tensors: Mapping[str, torch.Tensor], k_order: KOrder
) -> torch.Tensor:
    """A quantized projection's tensors by suffix to bf16 [K, N], K with its padding."""
    if quant_format == "wint2":
        return wint2.dequantize(
            tensors["quant_weight"],
            tensors["weight_scale"],
            tensors["super_scales"].to(torch.bfloat16),
            tensors["code_scale"],
            tensors["code_zp"],
            k_order=k_order,
        )
    if quant_format == "wint2t":
        super_scales = tensors["super_scales"].to(torch.bfloat16)
        return wint2t.dequantize(tensors["quant_weight"], tensors["weight_scale"], super_scales)
    levels, scale = tensors["quant_weight"].view(torch.int8), tensors["weight_scale"].to(torch.bfloat16)
    if quant_format == "wint4":
        return wint4.dequantize(wint4.unpack(levels), scale)
    return wint8.dequantize(wint8.unpack(levels), scale)


def expected_tensors(
    stem: str, quant_format: QuantFormat, num_inputs: int, num_outputs: int
) -> dict[str, Expected]:
    """A quantized projection's tensors by suffix."""
    columns = (num_outputs,)
    if quant_format in ("wint2", "wint2t"):
        rows = _round_up(num_inputs, ROW_MULTIPLE)
        sizes: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            "quant_weight": ((torch.uint8,), (rows // 4, num_outputs)),
            "weight_scale": ((torch.uint8,), (rows // ROW_MULTIPLE, num_outputs)),
            "super_scales": (FLOATS, columns),
        }
        if quant_format == "wint2":
            sizes |= {"code_scale": ((torch.float32,), columns), "code_zp": ((torch.float32,), columns)}
    else:
        packed = num_outputs if quant_format == "wint8" else num_outputs // 2
        sizes = {
            "quant_weight": ((torch.int8, torch.uint8), (packed, _round_up(num_inputs, GROUP_SIZE))),
            "weight_scale": (FLOATS, columns),
        }
    return {suffix: Expected(f"{stem}.{suffix}", *size) for suffix, size in sizes.items()}


def stored_format(tensors: Mapping[str, StoredTensor], stem: str, num_outputs: int) -> QuantFormat:
    """How the projection `stem` is stored, read off its tensors."""
    packed = tensors.get(f"{stem}.quant_weight")
    if packed is None:
        return "none"
    if f"{stem}.code_scale" in tensors:
        return "wint2"
    if f"{stem}.super_scales" in tensors:
        return "wint2t"
    return "wint8" if packed.shape[:1] == (num_outputs,) else "wint4"


def tensor_problem(tensor: StoredTensor, want: Expected) -> str | None:
    """How a tensor differs from what is expected, or None."""
    if tensor.dtype in want.dtypes and tensor.shape == want.shape:
        return None
    wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in want.dtypes)
    found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    return f"{tensor.name}: expected {wanted} {list(want.shape)}, {tensor.file.path.name} has {found}"


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple

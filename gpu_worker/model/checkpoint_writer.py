"""Writes our checkpoints: Paddle's names, quantized projections, one atomic safetensors shard at a time."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cuda_kernels.formats import wint4, wint8
from cuda_kernels.formats.wint2 import Wint2Weight
from cuda_kernels.formats.wint2t import Wint2tWeight
from cuda_kernels.formats.wint4 import Wint4Weight
from cuda_kernels.formats.wint8 import Wint8Weight

QuantizedWeight = Wint2Weight | Wint2tWeight | Wint4Weight | Wint8Weight

_READABLE = 0o644  # save_file makes files that only their owner can read, yet services run as other users
INDEX_NAME = "model.safetensors.index.json"


def shard_name(number: int, total: int) -> str:
    """`number` counts from 1."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def stored_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """A projection's tensors as the file has them, under `ernie.{name}.`; WINT8 and WINT4 in Paddle's
    layout."""
    match weight:
        case Wint2Weight() | Wint2tWeight():
            parts = weight.tensors()
        case Wint8Weight(levels, scale):
            parts = {"quant_weight": wint8.pack(levels), "weight_scale": scale}
        case Wint4Weight(levels, scale):
            parts = {"quant_weight": wint4.pack(levels), "weight_scale": scale}
    return {f"ernie.{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` so that `path` either does not exist or is whole, even after a crash."""
    partial = path.with_suffix(".partial")
    save_file(
        {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
        partial,
        metadata={"format": "pt"},
    )
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.chmod(_READABLE)
    partial.rename(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` so that `path` either keeps its old content or has all of the new."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.rename(path)


def write_index(directory: Path, shards: Mapping[str, Mapping[str, int]]) -> None:
    """The index over `shards`: file name -> tensor name -> bytes."""
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    total = sum(size for tensors in shards.values() for size in tensors.values())
    write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def plain_tensor(tensor: Tensor) -> Tensor:
    """A tensor kept unquantized: bf16."""
    return tensor.to(torch.bfloat16).contiguous()

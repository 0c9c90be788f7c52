"""Which device and which arithmetic, when nobody says."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from cuda_kernels.compiled import has_integer_kernels
from cuda_kernels.cpu.panels import Activations
from gpu_worker.config import ModelConfig, QuantizationConfig
from gpu_worker.engine.errors import EngineArgsError

ActivationsChoice = Literal["auto", "int8", "float32"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """A device, and one sentence on why it was taken."""

    device: torch.device
    reason: str


def choose_device(wanted: str, rank: int = 0, size: int = 1) -> DeviceChoice:
    """That of a rank of `size`. `wanted` is auto, cpu or cuda; auto takes the GPU if it can be used."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise EngineArgsError("device", f"must be auto, cpu or cuda, got {wanted!r}")
    obstacle = "" if wanted == "cpu" else _cuda_obstacle()
    if wanted == "cuda" and obstacle:
        raise EngineArgsError("device", f"cuda cannot be used: {obstacle}")
    if wanted == "cpu" or obstacle:
        return DeviceChoice(torch.device("cpu"), obstacle or "as asked")
    if (count := torch.cuda.device_count()) < size:
        raise EngineArgsError("tensor_parallel_size", f"{size} needs {size} GPUs, this machine has {count}")
    if size > 1:
        torch.cuda.set_device(rank)
    major, minor = torch.cuda.get_device_capability()
    return DeviceChoice(
        torch.device("cuda", torch.cuda.current_device()),
        f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}",
    )


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`wanted` is auto, float32 or bfloat16; auto is bfloat16 on a GPU and float32 on the CPU."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if wanted not in DTYPES:
        raise EngineArgsError("dtype", f"must be auto, float32 or bfloat16, got {wanted!r}")
    return DTYPES[wanted]


def choose_activations(wanted: ActivationsChoice, config: ModelConfig, device: torch.device) -> Activations:
    """What quantized weights are multiplied with on a CPU; auto is int8 where it has the instructions."""
    can = device.type == "cpu" and has_integer_kernels()
    if wanted == "int8" and not can:
        raise EngineArgsError(
            "cpu_activations", "int8 needs Numba and a CPU with AVX-512 VNNI; auto or float32 do not"
        )
    is_quantized = config.quantization != QuantizationConfig()
    return "int8" if can and is_quantized and wanted != "float32" else "float32"


def _cuda_obstacle() -> str:
    """Why there is no GPU to use; empty if there is one."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device or no driver"
    if find_spec("cupy") is None:
        return "CuPy is not installed; install the extra cuda12 or cuda13"
    return ""

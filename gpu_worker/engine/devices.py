"""Which device and which arithmetic, when nobody says."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from gpu_worker.engine.errors import EngineArgsError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """A device, and one sentence on why it was taken."""

    device: torch.device
    reason: str


def choose_device(wanted: str) -> DeviceChoice:
    """`wanted` is auto, cpu or cuda; auto takes the GPU if it can be used."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise EngineArgsError("device", f"must be auto, cpu or cuda, got {wanted!r}")
    obstacle = "" if wanted == "cpu" else _cuda_obstacle()
    if wanted == "cuda" and obstacle:
        raise EngineArgsError("device", f"cuda cannot be used: {obstacle}")
    if wanted == "cpu" or obstacle:
        return DeviceChoice(torch.device("cpu"), obstacle or "as asked")
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


def _cuda_obstacle() -> str:
    """Why there is no GPU to use; empty if there is one."""
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device or no driver"
    if find_spec("cupy") is None:
        return "CuPy is not installed; install the extra cuda12 or cuda13"
    return ""

"""Weights made up from config.json alone, for sizes and for benchmarks of shapes without a checkpoint.

Names, shapes and formats are those of Paddle's layout; values are random and made where they are used.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch

from gpu_worker.config import ModelConfig, QuantFormat
from gpu_worker.model.checkpoint import Checkpoint
from gpu_worker.model.plan import ModelPlan, configured_format, plan_with
from gpu_worker.model.safetensors_file import StoredTensor
from gpu_worker.model.stored_weight import Expected, Kind
from gpu_worker.model.tensor_finder import PADDLE, TensorFinder

_DEVIATION = 0.02  # of the weights
_CODE_GRID = 128  # our quantizer's codes are multiples of 1/128, and its best ones lie where these do
_WINT2_RMS = 163.0  # of a random level (18.5) times a random local scale (8.8)


def plan_dummy(config: ModelConfig, device: torch.device | None = None) -> ModelPlan:
    """The weights that a checkpoint of this config would have; read, they are random tensors on `device`."""
    return plan_with(config, _DummyFinder(config, DummyFile(config.path, device or torch.device("cpu"))))


class DummyFile:
    """Makes a tensor up when it is read: the same for the same name, device and shape."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path = path
        self._generator = torch.Generator(device)

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        generator = self._generator.manual_seed(zlib.crc32(tensor.name.encode()))
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=generator.device)
        return _fill(empty, _leaf(tensor.name), generator)

    def release(self, tensor: StoredTensor) -> None:
        """Nothing: the tensor belongs to its reader."""


class _DummyFinder(TensorFinder):
    """Finds whatever it is asked for, in the format that the config's quantization gives it."""

    def __init__(self, config: ModelConfig, file: DummyFile) -> None:
        super().__init__(Checkpoint(config.path, ({},)), PADDLE)
        self._config, self._file = config, file

    def __contains__(self, name: str) -> bool:
        return True

    @property
    def has_lm_head(self) -> bool:
        return not self._config.tie_word_embeddings

    def _format(self, stem: str, kind: Kind, num_outputs: int) -> QuantFormat:
        return configured_format(self._config, stem, kind)

    def _find(
        self, tensors: Mapping[str, StoredTensor], expected: Mapping[str, Expected]
    ) -> dict[str, StoredTensor]:
        return {
            key: StoredTensor(want.name, self._file, _dtype(want), want.shape, 0)
            for key, want in expected.items()
        }


def _dtype(want: Expected) -> torch.dtype:
    is_router = want.name.endswith(("gate.weight", "correction_bias"))
    return torch.float32 if is_router else want.dtypes[0]


def _leaf(name: str) -> str:
    return "norm.weight" if name.endswith("norm.weight") else name.rpartition(".")[2]


def _fill(tensor: torch.Tensor, leaf: str, generator: torch.Generator) -> torch.Tensor:
    """Values of the size that a trained model's have, by the last part of the tensor's name."""
    match leaf:
        case "quant_weight" | "weight_scale" if tensor.dtype in (torch.uint8, torch.int8):
            tensor.view(torch.uint8).random_(0, 256, generator=generator)
        case "weight_scale":
            tensor.fill_(_DEVIATION / 20)
        case "super_scales":
            tensor.fill_(_DEVIATION / _WINT2_RMS)
        case "code_scale":
            tensor.random_(15474, 15487, generator=generator).div_(_CODE_GRID)  # 120.89 to 120.98
        case "code_zp":
            tensor.random_(300 * _CODE_GRID, 1400 * _CODE_GRID, generator=generator).div_(_CODE_GRID)
        case "norm.weight":
            tensor.fill_(1)
        case "e_score_correction_bias":
            tensor.zero_()
        case _:
            tensor.normal_(0, _DEVIATION, generator=generator)
    return tensor

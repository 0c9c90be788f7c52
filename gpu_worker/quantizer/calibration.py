"""Calibration text to windows of token ids."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.quantizer.errors import QuantizeError

_DEFAULT = Path(__file__).with_name("calibration.txt")


def default_text() -> str:
    """The text that ships: samples of SmolLM2-135M-Instruct (see tests/bench/make_calibration.py)."""
    return _DEFAULT.read_text(encoding="utf-8")


def windows(token_ids: Sequence[int], num_windows: int, length: int) -> Tensor:
    """int64 [S, T] windows spread evenly over `token_ids`, S at most `num_windows` and without overlap."""
    available = len(token_ids) // length
    if not available:
        raise QuantizeError(f"the calibration text has {len(token_ids)} tokens, one window needs {length}")
    count = min(num_windows, available)
    starts = torch.linspace(0, len(token_ids) - length, count).long()
    ids = torch.tensor(token_ids, dtype=torch.int64)
    return torch.stack([ids[start : start + length] for start in starts])

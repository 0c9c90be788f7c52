"""A tiny checkpoint quantized in the test's process: what the quantizer's tests share."""

from pathlib import Path

import torch

from gpu_worker.model.config_reader import read_model_config
from gpu_worker.quantizer.pipeline import quantize_checkpoint
from gpu_worker.quantizer.recipe import Recipe
from gpu_worker.quantizer.source import Source

CPU = torch.device("cpu")


def tokens(num_windows=4, length=32, seed=0, vocab_size=300):
    return torch.randint(vocab_size, (num_windows, length), generator=torch.Generator().manual_seed(seed))


def source(path: Path) -> Source:
    return Source(read_model_config(path), CPU)


WINT4 = Recipe(wint4_end_layer=2, min_rows=16)  # no search: where the format does not matter

PLAIN = Recipe(wint4_end_layer=2, correct_experts=False, correct_dense=False, min_rows=16)


def quantize(path: Path, output: Path, recipe=WINT4, **options):
    return quantize_checkpoint(source(path), output, options.pop("calibration", tokens()), recipe, **options)

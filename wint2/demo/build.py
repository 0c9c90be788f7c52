"""Builds the demo's checkpoints, full precision and quantized, each whole or not there at all."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.model.checkpoint_writer import shard_name, write_index, write_json, write_shard
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.quantizer.calibration import default_text, windows
from gpu_worker.quantizer.pipeline import quantize_checkpoint
from gpu_worker.quantizer.recipe import Recipe
from gpu_worker.quantizer.source import Source
from wint2.demo import convert, tokenizer
from wint2.demo.importance import neuron_importance
from wint2.demo.source import DenseModel, fetch
from wint2.progress import OnProgress

WINDOW = 512
_WINDOWS, _IMPORTANCE_WINDOWS = 14, 4  # that the text is cut into, and that say which neurons matter
HELD_OUT_TOKENS = 1024


@dataclass(frozen=True)
class DemoRecipe:
    """How the demo is quantized, and on how many windows of calibration text, so long each."""

    recipe: Recipe
    num_windows: int
    window: int


# docs/performance.md says what each keeps of the original.
RECIPES = {
    "wint2": DemoRecipe(Recipe(wint4_end_layer=7, effort="fast"), 12, 512),
    "faithful": DemoRecipe(Recipe(wint4_end_layer=18, low_end_layer=20, effort="normal"), 256, 32),
}


def build_demo(output: Path, cache: Path, name: str, on_progress: OnProgress) -> None:
    """Make `output`/full and `output`/`name`, one of RECIPES, where they are missing."""
    full, quantized = output / "full", output / name
    if quantized.exists() and full.exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    on_progress("fetching the source model", 0, 1)
    dense = DenseModel.open(fetch(cache))
    ids = tokenizer.build(dense.fields).encode(default_text()).ids
    if not full.exists():
        build_full(dense, full, windows(ids, _WINDOWS, WINDOW), on_progress)
    if not quantized.exists():
        _quantize(full, quantized, RECIPES[name], ids, on_progress)


def build_full(dense: DenseModel, output: Path, calibration_ST: Tensor, on_progress: OnProgress) -> None:
    """Write the converted checkpoint in Hugging Face's layout."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / "config.json", convert.config(dense))
    write_json(partial / "generation_config.json", convert.generation_config(dense))
    tokenizer.write_tokenizer(dense.fields, partial)
    config = read_model_config(partial)
    total = config.num_hidden_layers + 1
    shards = {shard_name(total, total): dict(convert.outer_tensors(dense))}
    write_shard(partial / shard_name(total, total), shards[shard_name(total, total)])
    with torch.inference_mode():
        for layer, importance in enumerate(
            neuron_importance(dense, config, calibration_ST[:_IMPORTANCE_WINDOWS])
        ):
            on_progress("converting dense to MoE", layer, config.num_hidden_layers)
            tensors = dict(convert.layer_tensors(dense, layer, convert.Neurons.deal(importance)))
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            shards[shard_name(layer + 1, total)] = tensors
            write_shard(partial / shard_name(layer + 1, total), tensors)
    sizes = {shard: {n: t.numel() * t.element_size() for n, t in ts.items()} for shard, ts in shards.items()}
    write_index(partial, sizes)
    partial.rename(output)


def _quantize(
    full: Path, output: Path, demo: DemoRecipe, token_ids: list[int], on_progress: OnProgress
) -> None:
    source = Source(read_model_config(full), torch.device("cpu"))
    fitted, held_out = _drawn(token_ids, demo)
    quantize_checkpoint(source, output, fitted, demo.recipe, held_out, on_progress)


def _drawn(token_ids: list[int], demo: DemoRecipe) -> tuple[Tensor, Tensor]:
    """Windows from anywhere in the text: to fit, and to compare the result on."""
    count = len(token_ids) // demo.window
    whole_ST = torch.tensor(token_ids[: count * demo.window]).view(count, demo.window)
    order = torch.randperm(len(whole_ST), generator=torch.Generator().manual_seed(0))
    num_held_out = HELD_OUT_TOKENS // demo.window
    return whole_ST[order[: demo.num_windows]], whole_ST[order[demo.num_windows :][:num_held_out]]

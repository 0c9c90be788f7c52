"""Builds the demo's two checkpoints, full precision and WINT2, each whole or not there at all."""

import shutil
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

RECIPE = Recipe(wint4_end_layer=7, effort="fast")
NUM_WINDOWS, NUM_HELD_OUT, WINDOW = 12, 2, 512
_IMPORTANCE_WINDOWS = 4


def build_demo(output: Path, cache: Path, on_progress: OnProgress) -> None:
    """Make `output`/full and `output`/wint2 where they are missing."""
    full, quantized = output / "full", output / "wint2"
    if quantized.exists() and full.exists():
        return
    output.mkdir(parents=True, exist_ok=True)
    on_progress("fetching the source model", 0, 1)
    dense = DenseModel.open(fetch(cache))
    calibration = _calibration(dense)
    if not full.exists():
        build_full(dense, full, calibration, on_progress)
    if not quantized.exists():
        _quantize(full, quantized, calibration, on_progress)


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


def _quantize(full: Path, output: Path, calibration_ST: Tensor, on_progress: OnProgress) -> None:
    source = Source(read_model_config(full), torch.device("cpu"))
    fitted, held_out = calibration_ST.split([NUM_WINDOWS, NUM_HELD_OUT])
    quantize_checkpoint(source, output, fitted, RECIPE, held_out, on_progress)


def _calibration(dense: DenseModel) -> Tensor:
    ids = tokenizer.build(dense.fields).encode(default_text()).ids
    return windows(ids, NUM_WINDOWS + NUM_HELD_OUT, WINDOW)

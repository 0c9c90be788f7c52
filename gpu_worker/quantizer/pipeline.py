"""`quantize_checkpoint`: layer after layer into a `.partial` directory, resumed if there, renamed when whole.

OUT.partial/progress.json            which layers are done, the recipe and calibration they were done with
            model-0000N-of-*.safetensors   one shard a layer, the first holds embedding, norm and head
            streams-0000N.safetensors      the calibration windows behind the last finished layer
            config.json, SHA256SUMS …      last, then OUT.partial becomes OUT
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gpu_worker.config import ModelConfig
from gpu_worker.model.checkpoint_writer import plain_tensor, shard_name, write_index, write_json, write_shard
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.plan import MoEPlan
from gpu_worker.quantizer import checksums, memory
from gpu_worker.quantizer import report as html_report
from gpu_worker.quantizer.errors import QuantizeError
from gpu_worker.quantizer.evaluate import evaluate
from gpu_worker.quantizer.experts import ExpertQuantizer, Inputs
from gpu_worker.quantizer.layer import DenseQuantizer, LayerResult, OnWeights, Streams
from gpu_worker.quantizer.recipe import Recipe
from gpu_worker.quantizer.runner import LayerRunner
from gpu_worker.quantizer.source import Source
from gpu_worker.quantizer.tuning import tune

REPORT_NAME = "quantization_report.json"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
_WORKING_FILES = ("streams-*.safetensors", "*.partial", "progress.json")


OnProgress = Callable[[str, int, int], None]  # what is being done, done, total


def quantize_checkpoint(
    source: Source,
    output_dir: Path,
    calibration_ST: Tensor,
    recipe: Recipe,
    held_out_ST: Tensor | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
    tuning_ST: Tensor | None = None,
) -> dict[str, Any]:
    """Quantize `source` into the new directory `output_dir`; returns the report, which it also holds.

    `calibration_ST` are token ids, int64 [windows, tokens]; on those of `held_out_ST` the written files are
    compared with the original, on those of `tuning_ST` (or calibration's) they are tuned if the recipe says
    so. A run that was killed goes on after its last finished layer when called again with the
    same arguments.
    """
    if output_dir.exists():
        raise QuantizeError(f"{output_dir} exists already; remove it or choose another directory")
    _check_input(source, recipe)
    _check_memory(source, recipe, calibration_ST)
    partial = output_dir.with_name(output_dir.name + ".partial")
    with torch.inference_mode():
        run = _Run(partial, source, recipe, calibration_ST)
        _check_space(partial, source, recipe)
        for layer in run.remaining_layers():
            run.quantize_layer(layer, on_progress)
        run.finish()
    report = run.report()
    if recipe.tuning.steps:
        report |= _evaluate("untuned", partial, source, held_out_ST, on_progress)
    losses = _tune(partial, source, recipe, calibration_ST if tuning_ST is None else tuning_ST, on_progress)
    run.seal()
    report |= {"tuning": losses} | _evaluate("evaluation", partial, source, held_out_ST, on_progress)
    write_json(partial / REPORT_NAME, report)
    (partial / html_report.NAME).write_text(html_report.render(report), encoding="utf-8")
    run.clean()
    partial.rename(output_dir)
    return report


def _evaluate(
    name: str, partial: Path, source: Source, held_out_ST: Tensor | None, on_progress: OnProgress
) -> dict[str, Any]:
    """What held-out windows say of the written files, under its name in the report; nothing without any."""
    if held_out_ST is None:
        return {}
    with torch.inference_mode():
        written = Source(read_model_config(partial), source.device)
        return {name: asdict(evaluate(written, held_out_ST, source, on_progress))}


def num_weights(config: ModelConfig, layer: int) -> int:
    """How many weights of a layer are in projections."""
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = hidden * (2 * query + 2 * config.num_key_value_heads * config.head_dim)
    inner = config.moe_intermediate_size * (config.num_experts + config.num_shared_experts)
    return attention + 3 * hidden * (inner if config.is_moe_layer(layer) else config.intermediate_size)


def _check_input(source: Source, recipe: Recipe) -> None:
    path, config = source.config.path, source.config
    stored = [layer.qkv.format for layer in source.plan.layers]
    stored += [expert.down.format for plan in _moe_plans(source) for expert in plan.experts]
    if any(format != "none" for format in stored):
        raise QuantizeError(f"{path}: quantized already; quantize the full-precision checkpoint")
    if recipe.wint4_end_layer >= config.num_hidden_layers:
        last = config.num_hidden_layers - 1
        raise QuantizeError(f"WINT4 up to layer {recipe.wint4_end_layer}, but the last layer is {last}")
    if recipe.low_end_layer is not None and recipe.low_end_layer <= recipe.wint4_end_layer:
        low, high = recipe.low_end_layer, recipe.wint4_end_layer
        raise QuantizeError(f"2-bit experts end at layer {low}, WINT4 goes up to layer {high}: none is left")


def _tune(
    partial: Path, source: Source, recipe: Recipe, ids_ST: Tensor, on_progress: OnProgress
) -> list[float]:
    return tune(source, partial, ids_ST, recipe.tuning, on_progress) if recipe.tuning.steps else []


def _check_memory(source: Source, recipe: Recipe, calibration_ST: Tensor) -> None:
    """Refuse at the start a tuning that cannot end well."""
    needed = memory.tuning_bytes(source.config, recipe.tuning, calibration_ST.shape[1])
    there = memory.total_bytes(source.device)
    if recipe.tuning.steps and needed > there:
        raise QuantizeError(
            f"tuning holds both models in memory, some {needed:,} bytes, but {source.device} has {there:,}; "
            "do without it (0 steps)"
        )


def _moe_plans(source: Source) -> Iterator[MoEPlan]:
    return (layer.mlp for layer in source.plan.layers if isinstance(layer.mlp, MoEPlan))


def _check_space(directory: Path, source: Source, recipe: Recipe) -> None:
    """Refuse at the start what would fill the disk hours later."""
    written = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    needed = memory.output_bytes(source.config, recipe) - written
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise QuantizeError(f"{directory}: the output needs {needed:,} more bytes, {free:,} are free")


class _Run:
    """One run over the layers; owns the partial directory."""

    def __init__(self, directory: Path, source: Source, recipe: Recipe, calibration_ST: Tensor) -> None:
        self._directory = directory
        self._source = source
        self._config = source.config
        self._recipe = recipe
        self._num_shards = source.config.num_hidden_layers + 1
        self._dense = DenseQuantizer(source, recipe)
        self._runner = LayerRunner(source)
        self._state = self._resume(_fingerprint(source.config, recipe, calibration_ST), calibration_ST)
        if not self._state["shards"]:
            self._begin(calibration_ST)

    def remaining_layers(self) -> Iterator[int]:
        return iter(range(len(self._state["layers"]), self._config.num_hidden_layers))

    def quantize_layer(self, layer: int, on_progress: OnProgress) -> None:
        """Quantize one layer and make it durable: shard, streams, then the progress that counts them."""
        result = LayerResult(self._counter(layer, on_progress))
        streams = self._run_layer(layer, self._load_streams(layer), result)
        _store(self._streams_path(layer + 1), vars(streams))
        self._write(layer + 2, result.tensors)
        self._state["layers"].append(result.figures())
        self._save()
        self._streams_path(layer).unlink()

    def finish(self) -> None:
        """Everything that a reader of the files needs."""
        source_dir = self._config.path
        write_index(self._directory, self._state["shards"])
        for name in _TOKENIZER_FILES:
            if (source_dir / name).exists():
                shutil.copyfile(source_dir / name, self._directory / name)
        content = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
        content["quantization_config"] = self._recipe.quantization_config(self._config)
        write_json(self._directory / "config.json", content)

    def seal(self) -> None:
        """Sum the files, which change no more."""
        checksums.write(self._directory, [self._directory / name for name in self._state["shards"]])

    def clean(self) -> None:
        """Remove what only an unfinished run needs."""
        for pattern in _WORKING_FILES:
            for path in self._directory.glob(pattern):
                path.unlink()

    def _run_layer(self, layer: int, streams: Streams, result: LayerResult) -> Streams:
        balance, x_RD, original_RD = self._dense.attention(layer, streams, result)
        plan, prefix = self._source.layer(layer).mlp, f"layers.{layer}.mlp"
        if isinstance(plan, MoEPlan):
            inputs = Inputs(
                x_RD, original_RD, self._runner.route(plan, x_RD), self._runner.route(plan, original_RD)
            )
            result.tensors |= self._router(prefix, plan)
            format = self._recipe.expert_format(layer)
            name = f"{prefix}.experts"
            ExpertQuantizer(self._source, self._recipe, name, format, inputs, balance, result).run(plan)
            self._dense.shared(f"{prefix}.shared_experts", plan, (x_RD, original_RD), balance, result)
        else:
            self._dense.mlp(prefix, plan, (x_RD, original_RD), balance, result)
        result.stream_error = balance.error()
        shape = streams.original.shape
        return Streams((balance.original - balance.deficit).view(shape), balance.original.view(shape))

    def _router(self, prefix: str, plan: MoEPlan) -> dict[str, Tensor]:
        gate = plan.shared_gate
        shared = {f"ernie.{prefix}.shared_expert_gate.weight": self._source.linear(gate)} if gate else {}
        return shared | {
            f"ernie.{prefix}.gate.weight": self._source.linear(plan.router),
            f"ernie.{prefix}.moe_statics.e_score_correction_bias": self._source.correction_bias(
                plan.correction_bias
            ),
        }

    def _counter(self, layer: int, on_progress: OnProgress) -> OnWeights:
        """Turns the weights that a layer reports into the run's progress."""
        sizes = [num_weights(self._config, index) for index in range(self._config.num_hidden_layers)]
        done = sum(sizes[:layer])

        def count(added: int) -> None:
            nonlocal done
            done += added
            on_progress("quantizing", done, sum(sizes))

        count(0)
        return count

    def _resume(self, fingerprint: str, calibration_ST: Tensor) -> dict[str, Any]:
        path = self._directory / "progress.json"
        if path.exists():
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if state["fingerprint"] == fingerprint:
                return state
            raise QuantizeError(
                f"{self._directory} holds an unfinished run with other options; remove it to start anew"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        shape = list(calibration_ST.shape)
        return {"fingerprint": fingerprint, "calibration": shape, "shards": {}, "layers": []}

    def _begin(self, calibration_ST: Tensor) -> None:
        plan = self._source.plan
        tensors = {
            "ernie.embed_tokens.weight": plain_tensor(self._source.vector(plan.embedding)),
            "ernie.norm.weight": plain_tensor(self._source.vector(plan.final_norm)),
        }
        if plan.lm_head is not None:
            tensors["lm_head.weight"] = plain_tensor(self._source.linear(plan.lm_head))
        hidden = self._source.embed(calibration_ST)
        _store(self._streams_path(0), {"quantized": hidden, "original": hidden.clone()})
        self._write(1, tensors)
        self._save()

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        name = shard_name(number, self._num_shards)
        _store(self._directory / name, tensors)
        self._state["shards"][name] = {key: t.numel() * t.element_size() for key, t in tensors.items()}

    def _save(self) -> None:
        write_json(self._directory / "progress.json", self._state)

    def _load_streams(self, layer: int) -> Streams:
        return Streams(**load_file(self._streams_path(layer), device=str(self._source.device)))

    def _streams_path(self, layer: int) -> Path:
        return self._directory / f"streams-{layer:05d}.safetensors"

    def report(self) -> dict[str, Any]:
        """What the run has to say of itself."""
        return {
            "source": {"name": self._config.path.name, "num_bytes": self._source.num_bytes},
            "num_bytes": sum(size for shard in self._state["shards"].values() for size in shard.values()),
            "recipe": asdict(self._recipe),
            "calibration": self._state["calibration"],
            "peak_memory_bytes": memory.peak_bytes(),
            "layers": self._state["layers"],
        }


def _store(path: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        write_shard(path, tensors)
    except (OSError, SafetensorError) as error:
        free = shutil.disk_usage(path.parent).free
        raise QuantizeError(
            f"{path} could not be written ({error}); {free:,} bytes are free. "
            "Make room and run the same command again: finished layers are kept"
        ) from error


def _fingerprint(config: ModelConfig, recipe: Recipe, calibration_ST: Tensor) -> str:
    """Says whether an unfinished run was of the same work."""
    digest = hashlib.sha256(calibration_ST.numpy().tobytes())
    digest.update(repr((config, recipe)).encode())
    return digest.hexdigest()

"""`quantize_checkpoint`: layer after layer into a `.partial` directory, resumed if there is one, renamed
when whole.

OUT.partial/progress.json            which layers are done, the recipe and calibration they were done with
            model-0000N-of-*.safetensors   one shard a layer, the first holds embedding, norm and head
            streams-0000N.safetensors      the calibration windows behind the last finished layer
            config.json …                  last, then OUT.partial becomes OUT
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gpu_worker.config import ModelConfig
from gpu_worker.model.checkpoint_writer import plain_tensor, shard_name, write_index, write_json, write_shard
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.quantizer.errors import QuantizeError
from gpu_worker.quantizer.layer import LayerQuantizer, Streams
from gpu_worker.quantizer.recipe import Recipe
from gpu_worker.quantizer.source import Source

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
_WORKING_FILES = ("progress.json", "streams-*.safetensors")


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for a progress bar."""

    layer: int
    num_layers: int


def quantize_checkpoint(
    source_dir: Path,
    output_dir: Path,
    calibration_ST: Tensor,
    recipe: Recipe,
    device: torch.device,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Quantize `source_dir` into the new directory `output_dir`; returns it.

    `calibration_ST` are token ids, int64 [windows, tokens]. A run that was killed goes on after its last
    finished layer when called again with the same arguments.
    """
    if output_dir.exists():
        raise QuantizeError(f"{output_dir} exists already; remove it or choose another directory")
    config = read_model_config(source_dir)
    partial = output_dir.with_name(output_dir.name + ".partial")
    with torch.inference_mode():
        run = _Run(partial, Source(source_dir, device), config, recipe, calibration_ST, device)
        for layer in run.remaining_layers():
            on_progress(Progress(layer, config.num_hidden_layers))
            run.quantize_layer(layer)
        on_progress(Progress(config.num_hidden_layers, config.num_hidden_layers))
        run.finish(source_dir)
    partial.rename(output_dir)
    return output_dir


class _Run:
    """One run over the layers; owns the partial directory."""

    def __init__(
        self,
        directory: Path,
        source: Source,
        config: ModelConfig,
        recipe: Recipe,
        calibration_ST: Tensor,
        device: torch.device,
    ) -> None:
        self._directory = directory
        self._source = source
        self._config = config
        self._recipe = recipe
        self._num_shards = config.num_hidden_layers + 1
        self._device = device
        self._layers = LayerQuantizer(source, config, recipe)
        self._state = self._resume(_fingerprint(config, recipe, calibration_ST))
        if not self._state["shards"]:
            self._begin(calibration_ST)

    def remaining_layers(self) -> Iterator[int]:
        return iter(range(len(self._state["layers"]), self._config.num_hidden_layers))

    def quantize_layer(self, layer: int) -> None:
        """Quantize one layer and make it durable: shard, streams, then the progress that counts
        them."""
        result, streams = self._layers.quantize(layer, self._load_streams(layer))
        write_shard(self._streams_path(layer + 1), vars(streams))
        self._write(layer + 2, result.tensors)
        self._state["layers"].append(
            {
                "projections": result.projections,
                "rows_per_expert": result.rows_per_expert,
                "stream_error": result.stream_error,
            }
        )
        self._save()
        self._streams_path(layer).unlink()

    def finish(self, source_dir: Path) -> None:
        """Everything but the rename that makes the directory a checkpoint."""
        write_index(self._directory, self._state["shards"])
        for name in _TOKENIZER_FILES:
            if (source_dir / name).exists():
                shutil.copyfile(source_dir / name, self._directory / name)
        write_json(self._directory / REPORT_NAME, self._report())
        content = json.loads((source_dir / "config.json").read_text(encoding="utf-8"))
        content["quantization_config"] = self._recipe.quantization_config(self._config)
        write_json(self._directory / "config.json", content)
        for pattern in _WORKING_FILES:
            for path in self._directory.glob(pattern):
                path.unlink()

    def _resume(self, fingerprint: str) -> dict[str, Any]:
        path = self._directory / "progress.json"
        if path.exists():
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if state["fingerprint"] == fingerprint:
                return state
            raise QuantizeError(
                f"{self._directory} holds an unfinished run with other options; remove it to start anew"
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        return {"fingerprint": fingerprint, "shards": {}, "layers": []}

    def _begin(self, calibration_ST: Tensor) -> None:
        embedding = self._source.tensor("embed_tokens.weight")
        tensors = {
            "ernie.embed_tokens.weight": plain_tensor(embedding),
            "ernie.norm.weight": plain_tensor(self._source.tensor("norm.weight")),
        }
        head = self._source.head()
        if head is not None:
            tensors["lm_head.weight"] = plain_tensor(head)
        hidden = embedding[calibration_ST.to(self._device)].float()
        write_shard(self._streams_path(0), {"quantized": hidden, "original": hidden.clone()})
        self._write(1, tensors)
        self._save()

    def _write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        name = shard_name(number, self._num_shards)
        write_shard(self._directory / name, tensors)
        self._state["shards"][name] = {key: t.numel() * t.element_size() for key, t in tensors.items()}

    def _save(self) -> None:
        write_json(self._directory / "progress.json", self._state)

    def _load_streams(self, layer: int) -> Streams:
        return Streams(**load_file(self._streams_path(layer), device=str(self._device)))

    def _streams_path(self, layer: int) -> Path:
        return self._directory / f"streams-{layer:05d}.safetensors"

    def _report(self) -> dict[str, Any]:
        return {"recipe": asdict(self._recipe), "layers": self._state["layers"]}


def _fingerprint(config: ModelConfig, recipe: Recipe, calibration_ST: Tensor) -> str:
    """Says whether an unfinished run was of the same work."""
    digest = hashlib.sha256(calibration_ST.numpy().tobytes())
    digest.update(repr((config, recipe)).encode())
    return digest.hexdigest()

"""`wint2 doctor --config DIR`: what a model takes, and on which GPUs it fits, from its config.json alone."""

from __future__ import annotations

from pathlib import Path

from gpu_worker.config import SchedulerConfig
from gpu_worker.engine.build import describe_quantization
from gpu_worker.engine.memory import CACHE_DTYPES
from gpu_worker.engine.preflight import fits, footprints
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.errors import ConfigError
from wint2.errors import CommandError


def show(folder: Path, kv_cache_dtype: str, max_num_seqs: int, max_num_batched_tokens: int) -> None:
    """Prints the tables. CommandError says what is wrong with the config."""
    try:
        config = read_model_config(folder)
    except ConfigError as error:
        raise CommandError(f"--config: {error}") from error
    quantization = describe_quantization(config.quantization, config.num_hidden_layers)
    print(f"{config.model_type}, {config.num_hidden_layers} layers, {config.num_experts} experts")
    print(f"quantization: {quantization}")
    limits = SchedulerConfig(max_num_seqs, max_num_batched_tokens)
    found = footprints(config, CACHE_DTYPES[kv_cache_dtype], limits)
    print(*found[1].lines(), *fits(found), sep="\n")

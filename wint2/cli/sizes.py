"""What `wint2 doctor` says of a model: its sizes from config.json alone, or what a load would find."""

from __future__ import annotations

from pathlib import Path

from gpu_worker.config import SchedulerConfig
from gpu_worker.engine.build import describe_quantization
from gpu_worker.engine.memory import CACHE_DTYPES, GIB
from gpu_worker.engine.preflight import fits, footprints
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.errors import CheckpointError, ConfigError
from gpu_worker.model.plan import plan_model
from tokenizer_svc.errors import TokenizerLoadError
from tokenizer_svc.tokenizer import load_tokenizer
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


def look_into(folder: Path) -> list[str]:
    """What the checkpoint is, from its headers: no weight is read. CommandError tells all that is wrong."""
    problems: list[str] = []
    try:
        config = read_model_config(folder)
        checkpoint = open_checkpoint(folder)
        notes = plan_model(config, checkpoint).notes
    except (ConfigError, CheckpointError) as error:
        problems += str(error).splitlines()
    try:
        load_tokenizer(folder)
    except TokenizerLoadError as error:
        problems += error.problems
    if problems:
        raise CommandError("\n".join(problems))
    quantization = describe_quantization(config.quantization, config.num_hidden_layers)
    found = f"{config.model_type}, {checkpoint.num_bytes / GIB:.2f} GiB, {config.num_experts} experts"
    return [f"{found}, quantization {quantization}", *notes]

"""Checkpoints cut for tensor parallelism, as Paddle's tools write them: folders rank0/, rank1/, ...

Written from the format's description, not with the loader's code; every rank is quantized by itself, so that
its scales are its own.
"""

import json
from pathlib import Path

import torch
from safetensors.numpy import save_file

from tests.tiny import (
    CONFIG,
    QUANTIZATION_CONFIG,
    dequantized,
    paddle_tensors,
    tiny_weights,
    write_tokenizer,
)

OUTPUT_SPLIT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
INPUT_SPLIT = ("o_proj", "down_proj")


def make_rank_folders(path: Path, num_ranks: int, *, quantized: bool, seed: int = 0, **overrides: object):
    """Write the folder; returns the weights that it stands for, under Hugging Face's names, float32."""
    config = CONFIG | overrides | ({"quantization_config": QUANTIZATION_CONFIG} if quantized else {})
    weights = tiny_weights(config, seed)
    meant = []
    for rank in range(num_ranks):
        part = {name: rank_part(name, weight, rank, num_ranks) for name, weight in weights.items()}
        folder = path / f"rank{rank}"
        folder.mkdir(parents=True)
        save_file(paddle_tensors(config, part), folder / "model.safetensors", metadata={"format": "np"})
        meant.append(dequantized(config, part) if quantized else {n: w.float() for n, w in part.items()})
    (path / "config.json").write_text(json.dumps(config))
    write_tokenizer(path)
    return {name: _join(name, [part[name] for part in meant]) for name in weights}


def rank_part(name: str, weight: torch.Tensor, rank: int, num_ranks: int) -> torch.Tensor:
    axis = split_axis(name)
    return weight if axis is None else weight.chunk(num_ranks, dim=axis)[rank].contiguous()


def split_axis(name: str) -> int | None:
    """Of an [out, in] weight; None for what every rank has whole."""
    leaf = name.split(".")[-2]
    return 0 if leaf in OUTPUT_SPLIT else 1 if leaf in INPUT_SPLIT else None


def _join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    axis = split_axis(name)
    return parts[0] if axis is None else torch.cat(parts, dim=axis)

"""Greedy completions of a GPU's engine, judged token by token by the CPU halves of the same ops.

The judge holds the very weights that the GPU streams, brought to the CPU: there every op runs its plain
half, in the same bfloat16 between the ops. It reads prompt and completion at once, and says of every token of
the completion by how much its own first choice was ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from gpu_worker.engine.build import EngineArgs, build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.profiling import padding_batch
from gpu_worker.engine.sequence import Request
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.decoder import Decoder
from gpu_worker.sampling_params import SamplingParams

BLOCK = 64
TEXT = Path(__file__).parents[1] / "wint2" / "genesis.txt"


@dataclass(frozen=True, slots=True)
class Agreement:
    """By how much the judge's first choice was ahead, as a share of its logit: [N] of each completion."""

    gaps: tuple[torch.Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(gap) for gap in self.gaps)

    @property
    def num_agreed(self) -> int:
        return sum(int((gap == 0).sum()) for gap in self.gaps)

    @property
    def num_equal(self) -> int:
        """Completions that the judge would have made itself."""
        return sum(not bool(gap.any()) for gap in self.gaps)

    @property
    def largest_gap(self) -> float:
        return max(float(gap.max()) for gap in self.gaps)

    def __str__(self) -> str:
        return (
            f"{self.num_agreed} of {self.num_tokens} tokens, {self.num_equal} of {len(self.gaps)} "
            f"completions throughout, largest gap {self.largest_gap:.2%} of the logit"
        )


def build(folder: Path, device: str, dtype: str, *, use_cudagraph: bool = True) -> tuple[Engine, Decoder]:
    args = EngineArgs(
        model=folder,
        device=device,
        dtype=dtype,
        cpu_activations="float32",
        max_model_len=256,
        max_num_seqs=32,
        num_kv_blocks=200,
        use_cudagraph=use_cudagraph,
    )
    built = build_engine(args)
    return built.engine, built.model


def random_prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, vocab_size, (count, length), generator=generator).tolist()


def text_prompts(folder: Path, count: int, length: int) -> list[list[int]]:
    """Stretches of a text, side by side; tokens beyond a vocabulary cut short are left out."""
    vocab_size = read_model_config(folder).vocab_size
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT.read_text()).ids
    known = [token for token in ids if token < vocab_size]
    return [known[length * i : length * (i + 1)] for i in range(count)]


def complete(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy; a prompt arrives with every step, so that prompts run beside decodes."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    completions: list[list[int]] = [[] for _ in prompts]
    waiting = [Request(str(index), prompt, params) for index, prompt in enumerate(prompts)]
    while waiting or engine.has_work:
        if waiting:
            engine.add(waiting.pop(0))
        for output in engine.step():
            completions[int(output.request_id)] += output.token_ids
    return completions


def judge(model: Decoder, prompts: list[list[int]], completions: list[list[int]]) -> Agreement:
    """What a model on the CPU says of the completions."""
    gaps = []
    for prompt, completion in zip(prompts, completions, strict=True):
        hidden_TD = _read(model, [*prompt, *completion])[len(prompt) - 1 : -1]
        logits_TV = model.logits(hidden_TD)
        best_T = logits_TV.amax(-1)
        chosen_T = logits_TV.gather(1, torch.tensor(completion).unsqueeze(1)).squeeze(1)
        gaps.append((best_T - chosen_T) / best_T.abs())
    return Agreement(tuple(gaps))


def _read(model: Decoder, token_ids: list[int]) -> torch.Tensor:
    """Hidden states [T, D] of one sequence."""
    config, num_tokens = model.config, len(token_ids)
    num_blocks = -(-num_tokens // BLOCK)
    cache = KVCache(
        config.num_hidden_layers,
        num_blocks,
        BLOCK,
        config.num_key_value_heads,
        config.head_dim,
        model.dtype,
        torch.device("cpu"),
    )
    every = torch.arange(num_tokens)
    batch: Batch = replace(
        padding_batch(num_tokens, 1, torch.device("cpu")),
        input_ids_T=torch.tensor(token_ids),
        positions_T=every,
        slot_mapping_T=every,
        block_tables_SM=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
    )
    return model.forward(batch, cache)


def to_cpu(part: Any) -> Any:
    """A model's tensors, dataclass by dataclass, brought to the CPU."""
    if isinstance(part, torch.Tensor):
        return part.cpu()
    if isinstance(part, tuple):
        return tuple(map(to_cpu, part))
    if not is_dataclass(part) or isinstance(part, type):
        return part
    old = {field.name: getattr(part, field.name) for field in fields(part) if field.init}
    new = {name: to_cpu(value) for name, value in old.items()}
    return replace(part, **new) if any(new[name] is not old[name] for name in old) else part

"""What a decode step costs besides the model: many sequences, a null model, one core.

python -m tests.bench.bench_engine [--num-seqs 256] [--vocab-size 1024] [--num-steps 200] [--device cuda]

On a CPU the time is the CPU time of the engine's thread, so a busy machine hardly shows in it. On a GPU it is
the clock's, with overlap: what the host does and what the sampler does there, whichever takes longer. Masks
of structured output are made on another thread.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from gpu_worker.config import CacheConfig, EngineConfig, SchedulerConfig
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.llguidance_grammars import LlguidanceGrammars, TokenTexts
from gpu_worker.engine.sequence import Request
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.sampling_params import SamplingParams, StructuredOutput
from tests.fakes_model import model_config

BLOCK_SIZE = 64
PROMPT_LEN = 100
CASES = {
    "greedy": {"temperature": 0.0},
    "temperature 0.8": {"temperature": 0.8},
    "temperature 0.8, top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "repetition_penalty 1.1": {"temperature": 0.0, "repetition_penalty": 1.1},
    "logit_bias, bad words": {
        "temperature": 0.0,
        "logit_bias": {5: 1.0},
        "bad_words_token_ids": [[7, 8], [9]],
    },
    "top_logprobs 5": {"temperature": 0.0, "logprobs": 5},
    "structured output": {"temperature": 0.0, "structured_output": StructuredOutput(regex="[a-z ]{2000}")},
}


class NullModel:
    """Always the same logits, peaked as a language model's are; its own time is known."""

    def __init__(self, num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.seconds = 0.0
        self._hidden_TD = torch.zeros(num_seqs * PROMPT_LEN, 1, device=device)
        logits_SV = torch.randn(num_seqs, vocab_size, generator=torch.Generator().manual_seed(0)) * 4
        self._logits_SV = logits_SV.to(device)

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        return self._hidden_TD[: batch.num_tokens]

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        start = time.thread_time()
        logits_SV = self._logits_SV[: len(hidden_SD)].clone()
        self.seconds += time.thread_time() - start
        return logits_SV


def make_engine(
    model: NullModel, num_seqs: int, vocab_size: int, max_len: int, device: torch.device
) -> Engine:
    num_blocks = num_seqs * (-(-max_len // BLOCK_SIZE))
    config = EngineConfig(
        model=model_config(vocab_size),
        cache=CacheConfig(BLOCK_SIZE, num_blocks),
        scheduler=SchedulerConfig(num_seqs, num_seqs * PROMPT_LEN, max_len),
        device=device,
        dtype=torch.float32,
        overlap=device.type == "cuda",
    )
    kv_cache = KVCache(1, num_blocks, BLOCK_SIZE, 1, 1, torch.float32, config.device)
    texts = TokenTexts([bytes([i % 256]) for i in range(vocab_size)], frozenset({0, 1}))
    return Engine(config, model, kv_cache, grammars=LlguidanceGrammars(lambda: texts, vocab_size, (1,)))


def time_steps(
    num_seqs: int, vocab_size: int, num_steps: int, params: SamplingParams, device: torch.device
) -> list[float]:
    """Seconds that each decode step took; on a CPU the engine's thread, the model's left out."""
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    model = NullModel(num_seqs, vocab_size, device)
    engine = make_engine(model, num_seqs, vocab_size, PROMPT_LEN + num_steps + 64, device)
    for i in range(num_seqs):
        engine.add(Request(str(i), [2 + i % 7] * PROMPT_LEN, params))
    while len(engine.step()) < num_seqs:
        pass
    seconds = []
    for _ in range(num_steps):
        start = clock() - model.seconds
        assert len(engine.step()) == num_seqs
        seconds.append(clock() - model.seconds - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--num-steps", type=int, default=200)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.num_seqs} sequences, vocabulary {args.vocab_size}, {args.num_steps} steps; ms a step")
    for name, wishes in CASES.items():
        params = SamplingParams(**{"max_tokens": args.num_steps + 32, "ignore_eos": True, **wishes})
        seconds = sorted(time_steps(args.num_seqs, args.vocab_size, args.num_steps, params, args.device))
        best, median = seconds[0], statistics.median(seconds)
        print(f"  {name:30} best {best * 1e3:6.3f}   median {median * 1e3:6.3f}")


if __name__ == "__main__":
    main()

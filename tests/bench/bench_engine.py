"""What a step costs besides the model: 256 decoding sequences, a null model, one core.

python -m tests.bench.bench_engine [--num-seqs 256] [--vocab-size 1024] [--temperature 0]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from gpu_worker.config import CacheConfig, EngineConfig, SchedulerConfig
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.sequence import Request
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import model_config

BLOCK_SIZE = 64
PROMPT_LEN = 100


class NullModel:
    """Takes no time: always the same logits, uniform random numbers."""

    def __init__(self, num_seqs: int, vocab_size: int) -> None:
        self._hidden_TD = torch.zeros(num_seqs * PROMPT_LEN, 1)
        self._logits_SV = torch.rand(num_seqs, vocab_size)

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        return self._hidden_TD[: batch.num_tokens]

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        return self._logits_SV[: len(hidden_SD)]


def make_engine(num_seqs: int, vocab_size: int, num_steps: int) -> Engine:
    max_len = PROMPT_LEN + num_steps + 64
    num_blocks = num_seqs * (-(-max_len // BLOCK_SIZE))
    config = EngineConfig(
        model=model_config(vocab_size),
        cache=CacheConfig(BLOCK_SIZE, num_blocks),
        scheduler=SchedulerConfig(num_seqs, num_seqs * PROMPT_LEN, max_len),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    kv_cache = KVCache(1, num_blocks, BLOCK_SIZE, 1, 1, torch.float32, config.device)
    return Engine(config, NullModel(num_seqs, vocab_size), kv_cache)


def time_steps(engine: Engine, num_seqs: int, params: SamplingParams, num_steps: int) -> list[float]:
    """Seconds of each decode step."""
    for i in range(num_seqs):
        engine.add(Request(str(i), [2 + i % 7] * PROMPT_LEN, params))
    while engine.stats().num_running < num_seqs or engine.stats().num_pending_prefill_tokens:
        engine.step()
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        assert len(engine.step()) == num_seqs
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--profile", type=Path, help="write a cProfile of the steps here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    params = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.num_steps + 32, ignore_eos=True
    )
    engine = make_engine(args.num_seqs, args.vocab_size, args.num_steps)
    seconds = sorted(time_steps(engine, args.num_seqs, params, args.num_steps))
    print(
        f"{args.num_seqs} sequences, vocabulary {args.vocab_size}, temperature {args.temperature}, "
        f"top_p {args.top_p}: median {statistics.median(seconds) * 1e3:.3f} ms, "
        f"p90 {seconds[len(seconds) * 9 // 10] * 1e3:.3f} ms a step"
    )


if __name__ == "__main__":
    main()

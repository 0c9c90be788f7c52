"""ERNIE 4.5's shapes on one GPU, offline: decode rates, time to the first token, the parts of a step.

python -m tests.bench.bench_gpu_serving --shape 300b [--output FILE.json]
python -m tests.bench.bench_gpu_serving --shape 300b --num-layers 40     what fits a smaller GPU

Weights are random, made on the device in the formats of the published checkpoint (WINT2, WINT4 and WINT8), so
times are real and texts are not. One model is loaded, by `LLM`; its steps are timed with and without CUDA
graphs, overlap of host and device, and prefix caching, and `LLM.generate` from text to text.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gpu_worker.config import SchedulerConfig
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.memory import GIB
from gpu_worker.engine.preflight import footprint
from gpu_worker.engine.sequence import Request
from gpu_worker.llm import LLM
from gpu_worker.sampling_params import SamplingParams
from tests.bench.gpu_shapes import SHAPES, write_model_folder
from tests.bench.gpu_timeline import Timeline, record
from tests.bench.http_load import text_of
from tests.bench.results import save

CONCURRENCY = (1, 8, 32, 64, 128)
FEW = (1, 64)  # concurrency at which the ways are compared
PROMPTS = (128, 2048, 8192)
DECODE_PROMPT, DECODE_STEPS, WARM_UP_STEPS = 64, 24, 4
MAX_LEN = 8192 + 256
SHARED_PREFIX, SHARERS = 2048, 16
COMPLETION_TOKENS = 64  # of LLM.generate


class Lines(logging.Handler):
    """What was said while the model was loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@dataclass(frozen=True)
class Loaded:
    """A model of the shape, and what its start said."""

    llm: LLM
    seconds: float
    lines: list[str]

    def ready(self, **changes: bool) -> Ready:
        """An engine over the model's weights, KV cache and graphs that differs in some way from `LLM`'s."""
        first = self.llm._engine
        share, graphs = changes.pop("prefix_caching", False), changes.pop("graphs", True)
        cache = replace(first.config.cache, enable_prefix_caching=share)
        config = replace(first.config, cache=cache, **changes)
        runner = first._runner
        if graphs:
            return Ready(Engine(config, runner._model, runner._kv_cache, runner._graphs))
        return Ready(Engine(config, self.llm._model, runner._kv_cache))


@dataclass(frozen=True)
class Ready:
    """An engine to be timed."""

    engine: Engine

    @cached_property
    def limit(self) -> int:
        return self.engine.config.scheduler.max_num_seqs

    def decode_seconds(self, count: int) -> float:
        """The median step of that many decoding sequences, host work included."""
        names = self.decoding(count)
        for _ in range(WARM_UP_STEPS):
            self.engine.step()
        seconds = [timed(self.engine.step) for _ in range(DECODE_STEPS)]
        self.abort(names)
        return statistics.median(seconds)

    def decoding(self, count: int) -> list[str]:
        """That many sequences, their prompts read."""
        names = [f"decode-{index}" for index in range(count)]
        for index, name in enumerate(names):
            self.add(name, [3 + (7 * index + i) % 1000 for i in range(DECODE_PROMPT)], MAX_LEN // 2)
        while self.engine.stats().num_running < count or self.engine.stats().num_pending_prefill_tokens:
            self.engine.step()
        return names

    def first_token_seconds(self, length: int, *, seed: int = 0, runs: int = 2) -> float:
        """From adding a prompt to its first token, alone on the engine; the last of some runs."""
        prompt = [3 + (13 * i + 101 * seed) % 50000 for i in range(length)]
        for run in range(runs):
            self.add(f"first-{run}", prompt, 1)
            seconds = timed(self.drain)
        return seconds

    def shared_rate(self) -> float:
        """Tokens a second of requests at once whose prompts begin alike, as one before them did."""
        prefix = [3 + 17 * i % 50000 for i in range(SHARED_PREFIX)]
        self.add("before", prefix, 1)
        self.drain()
        for index in range(SHARERS):
            self.add(f"sharer-{index}", [*prefix, *(3 + 29 * i + index for i in range(64))], 32)
        return SHARERS * 32 / timed(self.drain)

    def decode_timeline(self, count: int, num_steps: int = 8) -> Timeline:
        """What a decode step of that many sequences is made of."""
        names = self.decoding(count)
        for _ in range(WARM_UP_STEPS):
            self.engine.step()
        timeline = record(self.engine.step, num_steps)
        self.abort(names)
        return timeline

    def prompt_timeline(self, length: int) -> Timeline:
        """What the step of one prompt is made of."""
        self.add("prompt", [3 + i % 1000 for i in range(length)], 1)
        return record(self.drain, 1)

    def add(self, name: str, prompt: list[int], max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        self.engine.add(Request(name, prompt, params))

    def abort(self, names: Sequence[str]) -> None:
        for name in names:
            self.engine.abort(name)
        self.drain()

    def drain(self) -> None:
        while self.engine.has_work:
            self.engine.step()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def load(args: argparse.Namespace, folder: Path) -> Loaded:
    """The model over made-up weights."""
    write_model_folder(folder, args.shape, args.num_layers)
    heard, logger = Lines(), logging.getLogger("gpu_worker")
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    start = time.perf_counter()
    llm = LLM(
        model=folder,
        device=args.device,
        load_format="dummy",
        max_model_len=MAX_LEN,
        max_num_seqs=args.max_num_seqs,
        enable_prefix_caching=False,
    )
    seconds = time.perf_counter() - start
    logger.removeHandler(heard)
    return Loaded(llm, seconds, heard.lines)


def measure(loaded: Loaded, concurrency: Sequence[int], prompts: Sequence[int]) -> dict[str, Any]:
    """Seconds of a decode step by concurrency, and to the first token by length, of each way."""
    ready = loaded.ready()
    counts = [count for count in concurrency if count <= ready.limit]
    few = sorted({min(count, ready.limit) for count in FEW})
    ways = {"as served": timings("as served", ready, counts, prompts)}
    ways["host and device in turn"] = timings("in turn", loaded.ready(overlap=False), few, prompts[:1])
    ways["without CUDA graphs"] = timings("without CUDA graphs", loaded.ready(graphs=False), few, prompts[:1])
    sharing = loaded.ready(prefix_caching=True)
    ways["prefix caching"] = timings("prefix caching, prompts known", sharing, few, prompts)
    for name, engine in (("as served", ready), ("prefix caching", sharing)):
        if prompts[-1] > SHARED_PREFIX:
            ways[name]["shared_tokens_per_second"] = rate = engine.shared_rate()
            print(f"  {SHARERS} requests that share {SHARED_PREFIX} tokens, {name}: {rate:.1f} tokens/s")
    return ways


def timings(title: str, ready: Ready, counts: Sequence[int], prompts: Sequence[int]) -> dict[str, Any]:
    print(f"  {title}:")
    steps, firsts = {}, {}
    for count in counts:
        steps[count] = step = ready.decode_seconds(count)
        print(f"  {count:4d} sequences {step * 1e3:9.2f} ms a step {count / step:9.1f} tokens/s", flush=True)
    for length in prompts:
        firsts[length] = first = ready.first_token_seconds(length)
        print(f"  first token of {length:5d} {first * 1e3:9.1f} ms", flush=True)
    return {"step_seconds": steps, "first_token_seconds": firsts}


def generate(llm: LLM, counts: Sequence[int]) -> dict[int, float]:
    """Tokens a second of `LLM.generate`, prompts of text and texts of completions included."""
    params, rates = SamplingParams(temperature=0, max_tokens=COMPLETION_TOKENS, ignore_eos=True), {}
    for count in counts:
        texts = [text_of(DECODE_PROMPT, 1000 * count + index) for index in range(count)]
        seconds = timed(lambda texts=texts: llm.generate(texts, params, use_tqdm=False))
        rates[count] = count * COMPLETION_TOKENS / seconds
        print(
            f"  LLM.generate, {count:4d} prompts {rates[count]:9.1f} tokens/s, prompts read included",
            flush=True,
        )
    return rates


def memory(loaded: Loaded) -> dict[str, float]:
    """GiB that the preflight foresees, and that are in use."""
    config = loaded.llm._engine.config
    limits = SchedulerConfig(config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens)
    found = footprint(config.model, config.cache.dtype, limits=limits)
    free, total = torch.cuda.mem_get_info()
    reserve = found.reserve
    sizes = {
        "weights foreseen": found.weight_bytes,
        "weights held": sum(loaded.llm._model.memory.device_bytes.values()),
        "CUDA foreseen": reserve.cuda_bytes,
        "a step foreseen": reserve.step_bytes,
        "graphs foreseen": reserve.graph_bytes,
        "KV cache": loaded.llm._engine._runner._kv_cache.size_bytes,
        "in use": total - free,
        "of it between tensors": torch.cuda.memory_reserved() - torch.cuda.memory_allocated(),
        "GPU": total,
    }
    in_gib = {name: size / GIB for name, size in sizes.items()}
    print("  memory, GiB: " + ", ".join(f"{name} {size:.1f}" for name, size in in_gib.items()), flush=True)
    return in_gib


def timelines(loaded: Loaded, ways: dict[str, Any]) -> dict[str, Any]:
    ready, served = loaded.ready(), ways["as served"]
    found = {}
    for count in sorted({min(count, ready.limit) for count in FEW}):
        timeline, seconds = ready.decode_timeline(count), served["step_seconds"][count]
        found[f"decode of {count}"] = timeline.figures(seconds)
        print_timeline(f"one decode step of {count}", timeline, seconds)
    seconds = served["first_token_seconds"][PROMPTS[0]]
    timeline = ready.prompt_timeline(PROMPTS[0])
    found[f"prompt of {PROMPTS[0]}"] = timeline.figures(seconds)
    print_timeline(f"one prompt of {PROMPTS[0]}", timeline, seconds)
    return found


def print_timeline(title: str, timeline: Timeline, clock_seconds: float) -> None:
    print(f"  {title}:")
    for line in timeline.lines(clock_seconds):
        print(f"    {line}", flush=True)


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        loaded = load(args, Path(name))
    print(f"{args.shape}, {args.num_layers or 'all'} layers, loaded in {loaded.seconds:.1f} s")
    print("\n".join(f"  {line}" for line in loaded.lines), flush=True)
    figures: dict[str, Any] = {"shape": args.shape, "num_layers": args.num_layers}
    figures |= {"start": loaded.lines, "load_seconds": loaded.seconds}
    prompts = [length for length in PROMPTS if length <= args.longest_prompt]
    figures["ways"] = measure(loaded, args.concurrency, prompts)
    figures["generate"] = generate(loaded.llm, [n for n in FEW if n <= args.max_num_seqs])
    if args.device == "cuda":
        figures["memory"] = memory(loaded)
        save(args.output, figures)  # the profiler is the part that may fail
        figures["timelines"] = timelines(loaded, figures["ways"])
    save(args.output, figures)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="21b")
    parser.add_argument("--num-layers", type=int, help="fewer than the shape has, if they do not fit")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--concurrency", type=int, nargs="+", default=CONCURRENCY)
    parser.add_argument("--longest-prompt", type=int, default=PROMPTS[-1])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()

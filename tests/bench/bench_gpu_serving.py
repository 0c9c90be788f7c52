"""ERNIE 4.5's shapes on one GPU: decode rate by concurrency, time to the first token, the parts of a step.

python -m tests.bench.bench_gpu_serving --shape 21b [--no-use-cudagraph]
python -m tests.bench.bench_gpu_serving --shape 300b --num-layers 40 --compare-layers 20

Weights are random, made on the device in the formats of the published checkpoint (WINT2, WINT4 and WINT8), so
times are real and texts are not. Fewer layers than the shape has fit a smaller GPU: what the missing ones
would take is then told from the difference between two such models.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gpu_worker.engine.build import EngineArgs, build_engine
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.memory import GIB
from gpu_worker.engine.sequence import Request
from gpu_worker.model.decoder import Decoder
from gpu_worker.sampling_params import SamplingParams
from tests.bench.gpu_shapes import SHAPES, config
from tests.bench.gpu_timeline import Timeline, record

CONCURRENCY = (1, 8, 32, 64, 128)
PROMPTS = (128, 2048, 8192)
DECODE_PROMPT, DECODE_STEPS, WARM_UP_STEPS = 64, 24, 4
MAX_LEN = 8192 + 256


@dataclass(frozen=True)
class Built:
    """A model of the shape with `num_layers` of its layers."""

    engine: Engine
    num_layers: int
    load_seconds: float
    description: tuple[str, ...]
    model: Decoder

    def without_graphs(self) -> Built:
        """The same weights and KV cache under an engine that launches kernel by kernel."""
        return replace(self, engine=Engine(self.engine.config, self.model, self.engine._kv_cache))


def build(shape: str, num_layers: int, max_num_seqs: int, use_cudagraph: bool, device: str) -> Built:
    """An engine over made-up weights."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config(shape, num_layers)))
        args = EngineArgs(
            model=Path(folder),
            device=device,
            load_format="dummy",
            max_model_len=MAX_LEN,
            max_num_seqs=max_num_seqs,
            use_cudagraph=use_cudagraph,
            enable_prefix_caching=False,
        )
        built = build_engine(args)
    seconds = time.perf_counter() - start
    return Built(built.engine, num_layers, seconds, built.description, built.model)


def add_requests(built: Built, count: int, prompt_len: int, max_tokens: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    for index in range(count):
        prompt = [3 + (7 * index + i) % 1000 for i in range(prompt_len)]
        built.engine.add(Request(f"{prompt_len}-{index}", prompt, params))


def drain(built: Built) -> None:
    while built.engine.has_work:
        built.engine.step()


def decode_seconds(built: Built, count: int) -> float:
    """The median step of that many decoding sequences, host work included."""
    engine = built.engine
    add_requests(built, count, DECODE_PROMPT, WARM_UP_STEPS + DECODE_STEPS + 40)
    while engine.stats().num_running < count or engine.stats().num_pending_prefill_tokens:
        engine.step()
    seconds = []
    for _ in range(WARM_UP_STEPS + DECODE_STEPS):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    drain(built)
    return statistics.median(seconds[WARM_UP_STEPS:])


def first_token_seconds(built: Built, prompt_len: int) -> float:
    """From adding a prompt to its first token, alone on the engine; the second of two."""
    for _ in range(2):
        start = time.perf_counter()
        add_requests(built, 1, prompt_len, 1)
        drain(built)
        seconds = time.perf_counter() - start
    return seconds


def print_decode(built: Built, count: int, clock_seconds: float, num_steps: int = 8) -> None:
    """What a decode step of that many sequences is made of."""
    engine = built.engine
    add_requests(built, count, DECODE_PROMPT, num_steps + WARM_UP_STEPS + count + 8)
    while engine.stats().num_running < count or engine.stats().num_pending_prefill_tokens:
        engine.step()
    for _ in range(WARM_UP_STEPS):
        engine.step()
    print(f"  one decode step of {count}:")
    print_timeline(record(engine.step, num_steps), clock_seconds)
    drain(built)


def print_prompt(built: Built, length: int, clock_seconds: float) -> None:
    """What the step of one prompt is made of."""
    add_requests(built, 1, length, 1)
    print(f"  one prompt of {length}:")
    print_timeline(record(lambda: drain(built), 1), clock_seconds)


def print_timeline(timeline: Timeline, clock_seconds: float) -> None:
    for line in timeline.lines(clock_seconds):
        print(f"    {line}", flush=True)


@dataclass(frozen=True)
class Figures:
    """Seconds of a decode step by concurrency, and to the first token by prompt length."""

    num_layers: int
    steps: dict[int, float]
    firsts: dict[int, float]


def measure(built: Built, max_num_seqs: int) -> Figures:
    counts = [count for count in CONCURRENCY if count <= max_num_seqs]
    steps = {count: decode_seconds(built, count) for count in counts}
    return Figures(
        built.num_layers, steps, {length: first_token_seconds(built, length) for length in PROMPTS}
    )


def whole(some: float, fewer: float, figures: Figures, fewer_figures: Figures, num_layers: int) -> float:
    """Seconds with all layers: every layer that is missing takes what one between the two models took."""
    layer = (some - fewer) / (figures.num_layers - fewer_figures.num_layers)
    return some + layer * (num_layers - figures.num_layers)


def print_figures(figures: Figures, fewer: Figures | None, num_layers: int) -> None:
    for count, step in figures.steps.items():
        print(f"  {count:4d} sequences {step * 1e3:9.2f} ms a step {count / step:9.1f} tokens/s", end="")
        if fewer:
            full = whole(step, fewer.steps[count], figures, fewer, num_layers)
            print(f"   {num_layers} layers: {full * 1e3:9.2f} ms {count / full:9.1f} tokens/s", end="")
        print()
    for length, first in figures.firsts.items():
        print(f"  first token of {length:5d} {first * 1e3:9.1f} ms", end="")
        if fewer:
            full = whole(first, fewer.firsts[length], figures, fewer, num_layers)
            print(f"   {num_layers} layers: {full * 1e3:9.1f} ms", end="")
        print(flush=True)


def print_without_graphs(built: Built, max_num_seqs: int) -> None:
    print("  without CUDA graphs:")
    for count in sorted({1, min(64, max_num_seqs)}):
        seconds = decode_seconds(built, count)
        print(f"  {count:4d} sequences {seconds * 1e3:9.2f} ms a step {count / seconds:9.1f} tokens/s")
    print(
        f"  first token of {PROMPTS[0]:5d} {first_token_seconds(built, PROMPTS[0]) * 1e3:9.1f} ms", flush=True
    )


def report(args: argparse.Namespace, num_layers: int, use_cudagraph: bool, fewer: Figures | None) -> Figures:
    """Builds, measures and prints one model."""
    built = build(args.shape, num_layers, args.max_num_seqs, use_cudagraph, args.device)
    print(f"{args.shape}, {num_layers} layers, CUDA graphs {'on' if use_cudagraph else 'off'},", end=" ")
    print(f"built in {built.load_seconds:.1f} s")
    for line in built.description:
        print(f"  {line}")
    figures = measure(built, args.max_num_seqs)
    print_figures(figures, fewer, SHAPES[args.shape]["num_hidden_layers"])
    if args.device == "cuda":
        free, total = (size / GIB for size in torch.cuda.mem_get_info())
        print(f"  GPU memory in use: {total - free:.1f} of {total:.1f} GiB")
        for count in sorted({1, min(64, args.max_num_seqs)}):
            print_decode(built, count, figures.steps[count])
        print_prompt(built, PROMPTS[0], figures.firsts[PROMPTS[0]])
        if use_cudagraph:
            print_without_graphs(built.without_graphs(), args.max_num_seqs)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="21b")
    parser.add_argument("--num-layers", type=int, help="fewer than the shape has, if they do not fit")
    parser.add_argument(
        "--compare-layers", type=int, help="of a second model, for what the missing ones take"
    )
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--use-cudagraph", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    fewer = None
    if args.compare_layers:
        fewer = report(args, args.compare_layers, args.use_cudagraph, None)
    report(args, args.num_layers or SHAPES[args.shape]["num_hidden_layers"], args.use_cudagraph, fewer)


if __name__ == "__main__":
    main()

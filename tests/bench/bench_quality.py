"""Perplexity and facts of a 2-bit model beside round-to-nearest and GPTQ at 2 bits, in one run.

python -m tests.bench.bench_quality FULL QUANTIZED... --text FILE...

The two baselines quantize the routed experts of FULL and nothing else (scale and zero point per 64 rows; GPTQ
with the default calibration text). A fact counts where FULL continues its prompt greedily with the answer.
Recipes were tried on the first list of facts alone; the demo's was then chosen by both.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.stored_weight import StoredLinear
from gpu_worker.quantizer import calibration, forward
from gpu_worker.quantizer.evaluate import evaluate
from gpu_worker.quantizer.runner import LayerRunner
from gpu_worker.quantizer.source import Source
from tests.bench import gptq_baseline

FACTS, HELD_OUT = (Path(__file__).with_name(name) for name in ("facts.tsv", "facts_held_out.tsv"))
NUM_NEW_TOKENS = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Held(Source):
    """A checkpoint whose decoded projections stay in memory, where a baseline may replace them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(read_model_config(directory), DEVICE)
        self.weights: dict[str, torch.Tensor] = {}

    def linear(self, stored: StoredLinear) -> torch.Tensor:
        if stored.name not in self.weights:
            self.weights[stored.name] = super().linear(stored)
        return self.weights[stored.name]


def baseline(full: Held, method: str, calibration_ST: torch.Tensor) -> Held:
    """`full` with its routed experts rounded by "rtn" or "gptq", each on what the rounded prefix gives it."""
    model = Held(full.config.path)
    runner = LayerRunner(model)
    hidden_STD = model.embed(calibration_ST)
    for number, layer in enumerate(model.plan.layers):
        x_RD = runner.attend(number, hidden_STD).mlp_input_RD
        moment = x_RD.T @ x_RD
        for expert in layer.mlp.experts:
            up_gate = full.linear(expert.up_gate)
            up_gate = gptq_baseline.gptq(up_gate, moment) if method == "gptq" else round_(up_gate)
            inner = forward.swiglu(x_RD, up_gate)
            down = full.linear(expert.down)
            down = gptq_baseline.gptq(down, inner.T @ inner) if method == "gptq" else round_(down)
            model.weights |= {expert.up_gate.name: up_gate, expert.down.name: down}
        hidden_STD = runner.run(number, hidden_STD)
    return model


def round_(weight: torch.Tensor) -> torch.Tensor:
    return gptq_baseline.round_to_nearest(weight)


def complete(model: Source, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
    """Greedy continuations; prompts are padded behind, where causal attention does not look."""
    sequences = [tokenizer.encode(prompt).ids for prompt in prompts]
    starts, runner, head = [len(ids) for ids in sequences], LayerRunner(model), model.head()
    for _ in range(NUM_NEW_TOKENS):
        length = max(map(len, sequences))
        hidden_STD = model.embed(torch.tensor([ids + [0] * (length - len(ids)) for ids in sequences]))
        for layer in range(model.config.num_hidden_layers):
            hidden_STD = runner.run(layer, hidden_STD)
        last_SD = runner.final_norm(hidden_STD)[range(len(sequences)), [len(ids) - 1 for ids in sequences]]
        for ids, token in zip(sequences, (last_SD @ head).argmax(-1).tolist(), strict=True):
            ids.append(token)
    return [tokenizer.decode(ids[start:]) for ids, start in zip(sequences, starts, strict=True)]


def known(model: Source, tokenizer: Tokenizer, path: Path) -> list[bool]:
    """Which facts of a list the model completes with their answer."""
    facts = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    texts = complete(model, tokenizer, [prompt for prompt, _ in facts])
    return [text.strip().startswith(answer) for text, (_, answer) in zip(texts, facts, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("full", type=Path)
    parser.add_argument("quantized", type=Path, nargs="*")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--num-windows", type=int, default=6)
    parser.add_argument("--calibration-windows", type=int, default=12)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--baselines", nargs="*", default=["rtn", "gptq"])
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.full / "tokenizer.json"))
    encode = lambda text, count: calibration.windows(tokenizer.encode(text).ids, count, args.window)  # noqa: E731
    texts = [encode(path.read_text(encoding="utf-8"), args.num_windows) for path in args.text]
    fitted_ST = encode(calibration.default_text(), args.calibration_windows)
    with torch.inference_mode():
        full = Held(args.full)
        facts = [known(full, tokenizer, path) for path in (FACTS, HELD_OUT)]
        first = [evaluate(full, ids_ST).perplexity for ids_ST in texts]
        figures = " ".join(f"{p:8.2f}" for p in first)
        print(f"{'full precision':<24} {figures}    facts {sum(facts[0])}, {sum(facts[1])}", flush=True)
        for name in (*args.baselines, *args.quantized):
            start = time.perf_counter()
            model = Held(name) if isinstance(name, Path) else baseline(full, name, fitted_ST)
            show(str(name), model, texts, first, facts, tokenizer, time.perf_counter() - start)


def show(name, model, texts, first, facts, tokenizer, seconds) -> None:
    found = [evaluate(model, ids_ST).perplexity for ids_ST in texts]
    ratio = math.exp(sum(math.log(a / b) for a, b in zip(found, first, strict=True)) / len(first))
    kept = [
        f"{sum(a and b for a, b in zip(known(model, tokenizer, path), before, strict=True))} of {sum(before)}"
        for path, before in zip((FACTS, HELD_OUT), facts, strict=True)
    ]
    print(
        f"{name[-24:]:<24} {' '.join(f'{p:8.2f}' for p in found)}    facts {', '.join(kept)}    "
        f"perplexity x{ratio:.3f}    made in {seconds:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()

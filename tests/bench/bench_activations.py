"""What activations of 8 bits cost: perplexity of a model on a CPU with float32 ones and with int8 ones.

python -m tests.bench.bench_activations --text FILE [--model .demo/wint2] [--windows 12]
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from cuda_kernels.cpu.panels import Activations, pack_dense
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.layers.linear import Linear
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.decoder import Decoder
from gpu_worker.model.loader import load_model
from tokenizer_svc.tokenizer import load_tokenizer

WINDOW = 512
CPU = torch.device("cpu")


def load(model: Path, activations: Activations) -> Decoder:
    return load_model(read_model_config(model), device=CPU, dtype=torch.float32, activations=activations)


def one_sequence(ids: torch.Tensor) -> Batch:
    tokens = torch.arange(len(ids))
    lens = torch.tensor([0, len(ids)], dtype=torch.int32)
    table = torch.zeros(1, 1, dtype=torch.int32)
    return Batch(ids, tokens, tokens, table, lens, lens[1:], len(ids), tokens[-1:])


def perplexity(decoder: Decoder, windows_ST: torch.Tensor) -> float:
    config, total = decoder.config, 0.0
    shape = config.num_hidden_layers, 1, WINDOW, config.num_key_value_heads, config.head_dim
    for ids in windows_ST:
        hidden = decoder.forward(one_sequence(ids), KVCache(*shape, torch.float32, CPU))
        total += F.cross_entropy(decoder.logits(hidden[:-1]), ids[1:], reduction="sum").item()
    return math.exp(total / (windows_ST.numel() - len(windows_ST)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=Path(".demo/wint2"))
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    ids = torch.tensor(load_tokenizer(args.model).encode(text, add_special_tokens=False))
    windows_ST = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    windows_ST = windows_ST[torch.linspace(0, len(windows_ST) - 1, args.windows).long()]
    exact, integer = load(args.model, "float32"), load(args.model, "int8")
    full_head = replace(integer, lm_head=Linear(pack_dense(integer.embedding.weight_VD)))
    print(f"{windows_ST.numel()} tokens of {args.text.name}, windows of {WINDOW}")
    for name, decoder in (("float32", exact), ("int8, bf16 head", full_head), ("int8", integer)):
        print(f"{name:>16}  perplexity {perplexity(decoder, windows_ST):.4f}")


if __name__ == "__main__":
    main()

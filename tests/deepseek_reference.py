"""DeepSeek-MoE 16B out of transformers' parts: Llama's attention around DeepSeek-V2-Lite's own mixtures."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

MIXTURE = (
    "hidden_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
)


def build(config: dict) -> LlamaForCausalLM:
    """The model of a config.json, its weights as torch draws them."""
    names = set(LlamaConfig().to_dict()) - {"model_type", "architectures"}
    model = LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in names & set(config)}))
    mixture = DeepseekV2Config(
        **{name: config[name] for name in MIXTURE}, topk_method="greedy", routed_scaling_factor=1.0
    )
    for layer in model.model.layers[config["first_k_dense_replace"] :]:
        layer.mlp = DeepseekV2Moe(mixture)
    return model.eval()


def save(path: Path, config: dict) -> None:
    """A checkpoint as DeepSeek publishes it: every expert's projections by themselves."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in build(config).state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            tensors[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            for part, piece in zip(parts, weight.chunk(len(parts)), strict=True):
                tensors[f"{stem}.{expert}.{part}.weight"] = torch.empty_like(piece).normal_(0, 0.02)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))


def load(path: Path) -> LlamaForCausalLM:
    model = build(json.loads((path / "config.json").read_text()))
    stored = {name: tensor.float() for name, tensor in load_file(path / "model.safetensors").items()}
    state = {}
    for name, tensor in model.state_dict().items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            state[name] = stored[name]
            continue
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        experts = [
            torch.cat([stored[f"{stem}.{expert}.{part}.weight"] for part in parts])
            for expert in range(len(tensor))
        ]
        state[name] = torch.stack(experts)
    model.load_state_dict(state)
    return model

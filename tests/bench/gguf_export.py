"""A model folder as llama.cpp's GGUF, every weight decoded to float16: the same model for the other side.

    python -m tests.bench.gguf_export MODEL SOURCE.gguf OUT.gguf

SOURCE is a GGUF file with the tokenizer to copy.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter

from gpu_worker.config import ModelConfig
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.plan import LayerPlan, ModelPlan, MoEPlan, plan_model

TOKENIZER_STRINGS = ("model", "pre")
TOKENIZER_IDS = ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")


def export(model: Path, source: Path, out: Path) -> None:
    config = read_model_config(model)
    writer = GGUFWriter(out, "ernie4_5-moe")
    write_config(writer, config)
    write_tokenizer(writer, GGUFReader(source))
    for name, tensor in tensors(config, plan_model(config, open_checkpoint(model))):
        full = tensor.ndim == 1 or name.endswith("ffn_gate_inp.weight")
        writer.add_tensor(name, tensor.to(torch.float32 if full else torch.float16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_config(writer: GGUFWriter, config: ModelConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_token)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_shared_count(config.num_shared_experts)
    writer.add_expert_shared_feed_forward_length(config.moe_intermediate_size * config.num_shared_experts)
    writer.add_interleave_moe_layer_step(1)
    writer.add_leading_dense_block_count(0)


def write_tokenizer(writer: GGUFWriter, source: GGUFReader) -> None:
    def contents(name: str) -> object:
        field = source.get_field(f"tokenizer.ggml.{name}")
        return None if field is None else field.contents()

    writer.add_tokenizer_model(contents("model"))
    writer.add_tokenizer_pre(contents("pre") or "smollm")
    writer.add_token_list(contents("tokens"))
    writer.add_token_types(contents("token_type"))
    writer.add_token_merges(contents("merges"))
    writer.add_bos_token_id(contents("bos_token_id"))
    writer.add_eos_token_id(contents("eos_token_id"))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


def tensors(config: ModelConfig, plan: ModelPlan) -> Iterator[tuple[str, torch.Tensor]]:
    yield "token_embd.weight", plan.embedding.dense()
    yield "output_norm.weight", plan.final_norm.dense()
    if plan.lm_head is not None:
        yield "output.weight", plan.lm_head.dense()
    for index, layer in enumerate(plan.layers):
        for name, tensor in layer_tensors(config, layer):
            yield f"blk.{index}.{name}", tensor.contiguous()


def layer_tensors(config: ModelConfig, layer: LayerPlan) -> Iterator[tuple[str, torch.Tensor]]:
    mlp = layer.mlp
    assert isinstance(mlp, MoEPlan)
    assert mlp.shared is not None
    yield "attn_norm.weight", layer.input_norm.dense()
    yield "ffn_norm.weight", layer.post_attention_norm.dense()
    parts = layer.qkv.dense().split(list(layer.qkv.sections))
    yield from zip(("attn_q.weight", "attn_k.weight", "attn_v.weight"), parts, strict=True)
    yield "attn_output.weight", layer.o.dense()
    yield "ffn_gate_inp.weight", mlp.router.dense()
    if mlp.correction_bias is not None:
        yield "exp_probs_b.bias", mlp.correction_bias.dense().flatten()
    gates, ups = zip(*(expert.up_gate.dense().chunk(2) for expert in mlp.experts), strict=True)
    yield "ffn_gate_exps.weight", torch.stack(gates)
    yield "ffn_up_exps.weight", torch.stack(ups)
    yield "ffn_down_exps.weight", torch.stack([expert.down.dense() for expert in mlp.experts])
    gate, up = mlp.shared.up_gate.dense().chunk(2)
    yield "ffn_gate_shexp.weight", gate
    yield "ffn_up_shexp.weight", up
    yield "ffn_down_shexp.weight", mlp.shared.down.dense()


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    export(*map(Path, sys.argv[1:4]))

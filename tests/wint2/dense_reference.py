"""The demo's source model in Hugging Face's own Llama, to hold the converted one against."""

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from wint2.demo.source import DenseModel

_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_llama(dense: DenseModel) -> LlamaForCausalLM:
    """float32, in evaluation mode."""
    heads = {
        "attn_q": dense.number("attention.head_count"),
        "attn_k": dense.number("attention.head_count_kv"),
    }
    state = {
        "model.embed_tokens.weight": dense["token_embd.weight"],
        "model.norm.weight": dense["output_norm.weight"],
    }
    for layer in dense.layers():
        for stored, name in _NAMES.items():
            weight = dense[f"blk.{layer}.{stored}.weight"]
            state[f"model.layers.{layer}.{name}.weight"] = (
                _halves(weight, heads[stored]) if stored in heads else weight
            )
    model = LlamaForCausalLM(_config(dense)).eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == ["lm_head.weight"]  # tied
    return model


def _halves(weight: Tensor, heads: int) -> Tensor:
    """GGUF interleaves each head's rotary pairs; Llama wants all first members, then all second ones."""
    size = weight.shape[0] // heads
    return weight.view(heads, size // 2, 2, -1).transpose(1, 2).reshape(weight.shape)


def _config(dense: DenseModel) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=dense.number("vocab_size"),
        hidden_size=dense.number("embedding_length"),
        intermediate_size=dense.number("feed_forward_length"),
        num_hidden_layers=dense.number("block_count"),
        num_attention_heads=dense.number("attention.head_count"),
        num_key_value_heads=dense.number("attention.head_count_kv"),
        max_position_embeddings=dense.number("context_length"),
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": dense.number("rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )

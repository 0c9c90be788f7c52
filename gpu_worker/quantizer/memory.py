"""How much memory and disk quantizing takes: bounds known before the first weight is read."""

import os
import resource

import torch

from gpu_worker.config import ModelConfig
from gpu_worker.quantizer.recipe import Recipe, Tuning

_FLOAT = 4
_EMBEDDING_COPIES = 3  # stored dtype, its check for finite values, and the copy that is written
_WEIGHT_COPIES = 16  # of one projection in float32: original, corrected, decoded, slots, targets, candidates
_MOMENT_COPIES = 8  # of one Hessian: damped, ordered, factors, couplings
_STREAM_COPIES = 10  # both streams, their normalized values, balance, attention, rows of an expert
_TUNED_EXPERT_COPIES = 4  # the original's and ours, in two precisions
_TUNED_DENSE_COPIES = 6  # the same, gradient and Adam's moments
_TUNED_COPIES = 10  # of an activation or of some rows' logits, from the products to their gradients
_LOGIT_ROWS = 2048
_STORED_BITS = {"wint2": 2.2, "wint2t": 2.2, "wint4": 4.1}


def peak_bytes() -> int:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def bound_bytes(config: ModelConfig, recipe: Recipe, num_tokens: int) -> int:
    """What `quantize_checkpoint` adds to the process at most, whatever the number of layers.

    One projection is worked on at a time; beside it live the streams of `num_tokens` calibration tokens, one
    Hessian, and the quantized tensors of the layer, which are written together.
    """
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    widest = max(hidden, inner, config.intermediate_size)
    streams = num_tokens * (_STREAM_COPIES * hidden + 4 * widest + 2 * config.num_experts)
    work = _WEIGHT_COPIES * _largest_projection(config) + _MOMENT_COPIES * max(hidden, inner) ** 2
    embedding = _EMBEDDING_COPIES * config.vocab_size * hidden
    layer = max(_layer_bytes(config, recipe, index) for index in range(config.num_hidden_layers))
    return _FLOAT * max(streams + work, embedding) + layer


def tuning_bytes(config: ModelConfig, tuning: Tuning, window: int) -> int:
    """What tuning needs at most: both models whole, gradients, Adam's moments, a batch's activations."""
    layers = range(config.num_hidden_layers)
    experts = sum(map(config.is_moe_layer, layers)) * config.num_experts * 3 * config.moe_intermediate_size
    dense = sum(_layer_bytes(config, Recipe(), layer) for layer in layers)
    weights = _TUNED_EXPERT_COPIES * experts * config.hidden_size + _TUNED_DENSE_COPIES * dense
    inner = config.moe_intermediate_size * (config.num_experts_per_token + config.num_shared_experts)
    activations = config.num_hidden_layers * _TUNED_COPIES * (config.hidden_size + inner)
    rows = tuning.batch * window
    logits = min(rows, _LOGIT_ROWS) * _TUNED_COPIES * config.vocab_size
    embedding = 2 * config.vocab_size * config.hidden_size
    return _FLOAT * (weights + embedding + rows * activations + logits)


def total_bytes(device: torch.device) -> int:
    """The memory of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def output_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """About how large the quantized checkpoint becomes."""
    heads = 1 if config.tie_word_embeddings else 2
    layers = sum(_layer_bytes(config, recipe, layer) for layer in range(config.num_hidden_layers))
    return layers + 2 * heads * config.vocab_size * config.hidden_size


def _largest_projection(config: ModelConfig) -> int:
    query, key = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shared = config.moe_intermediate_size * max(1, config.num_shared_experts)
    widths = [query + 2 * key, 2 * shared]
    if any(not config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)):
        widths.append(2 * config.intermediate_size)
    return config.hidden_size * max(widths)


def _layer_bytes(config: ModelConfig, recipe: Recipe, layer: int) -> int:
    """The quantized tensors of one layer."""
    hidden, query = config.hidden_size, config.num_attention_heads * config.head_dim
    dense = hidden * (2 * query + 2 * config.num_key_value_heads * config.head_dim)
    experts = 0.0
    if config.is_moe_layer(layer):
        size = 3 * config.moe_intermediate_size * hidden
        dense += size * config.num_shared_experts
        experts = size * config.num_experts * _STORED_BITS[recipe.expert_format(layer)] / 8
    else:
        dense += 3 * hidden * config.intermediate_size
    return int(experts + dense * (1 if recipe.dense == "wint8" else 2))

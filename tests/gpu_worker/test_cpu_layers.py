"""All layers in one compiled call: the bits of the ops, and whom it leaves to them."""

import pytest
import torch

from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.cpu_layers import with_compiled_layers
from gpu_worker.model.expert_counts import with_expert_counts
from gpu_worker.model.loader import load_model
from tests.cuda_kernels.cpu.test_dots import needs_dot4
from tests.tiny import make_tiny_model

CPU = torch.device("cpu")
WIDE = {"head_dim": 64}


def load(path, activations="float32"):
    config = read_model_config(path)
    return load_model(config, device=CPU, dtype=torch.float32, activations=activations)


def cache(decoder, dtype=torch.float32):
    config = decoder.config
    shape = config.num_hidden_layers, 4, 16, config.num_key_value_heads, config.head_dim
    return KVCache(*shape, dtype, CPU)


def steps():
    """Two prompts of 9 and 3, then a token of the first beside two of the second."""
    tables = torch.tensor([[2], [0]], dtype=torch.int32)
    for first, second in (((0, 9), (0, 3)), ((9, 10), (3, 5))):
        positions = torch.cat((torch.arange(*first), torch.arange(*second)))
        lengths = [end - start for start, end in (first, second)]
        owner = torch.repeat_interleave(torch.tensor([2, 0]), torch.tensor(lengths))
        starts = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
        ends = torch.tensor([first[1], second[1]], dtype=torch.int32)
        slots, ids = owner * 16 + positions, 5 + 3 * positions
        yield Batch(ids, positions, slots, tables, starts, ends, max(lengths), starts[1:].long() - 1)


@pytest.mark.parametrize("activations", ["float32", pytest.param("int8", marks=needs_dot4)])
@pytest.mark.parametrize("overrides", [{}, {"moe_num_shared_experts": 0}, {"moe_layer_start_index": 0}])
def test_one_call_has_the_bits_of_the_ops(tmp_path, activations, overrides):
    decoder = load(make_tiny_model(tmp_path, quantized=True, **WIDE, **overrides), activations)
    compiled = with_compiled_layers(decoder)
    assert compiled.compiled is not None
    one, many = cache(decoder), cache(decoder)
    for batch in steps():
        assert torch.equal(compiled.forward(batch, one), decoder.forward(batch, many))
    for ours, theirs in zip(one.layers, many.layers, strict=True):
        assert torch.equal(torch.stack(ours), torch.stack(theirs))


def test_another_cache_is_left_to_the_ops(tmp_path):
    decoder = load(make_tiny_model(tmp_path, quantized=True, **WIDE))
    compiled = with_compiled_layers(decoder)
    one, many = cache(decoder, torch.bfloat16), cache(decoder, torch.bfloat16)
    for batch in steps():
        assert torch.equal(compiled.forward(batch, one), decoder.forward(batch, many))


def test_narrow_heads_and_counted_experts_are_left_to_the_ops(tmp_path):
    narrow = load(make_tiny_model(tmp_path / "narrow", quantized=True))
    counted = with_expert_counts(load(make_tiny_model(tmp_path / "wide", quantized=True, **WIDE)))
    assert with_compiled_layers(narrow) is narrow
    assert with_compiled_layers(counted) is counted

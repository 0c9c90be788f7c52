"""What packing leaves of a GPU's memory, by a model of torch's allocator."""

import json

import pytest
import torch

from cuda_kernels.tiled import TiledWeight
from gpu_worker.model import gpu_weights, scratch
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.dummy import plan_dummy
from tests.gpu_worker.caching_allocator import MIB, DeviceMemory
from tests.tiny import CONFIG, QUANTIZATION_CONFIG

SCALE = 4096  # a MiB counts as 256 bytes
SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 4, "moe_layer_end_index": 3}


@pytest.fixture
def plan(tmp_path):
    quantized = CONFIG | SIZES | {"quantization_config": QUANTIZATION_CONFIG}
    (tmp_path / "config.json").write_text(json.dumps(quantized))
    return plan_dummy(read_model_config(tmp_path))


@pytest.fixture
def memory(monkeypatch):
    memory = DeviceMemory(SCALE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", memory.empty_cache)
    monkeypatch.setattr(torch.cuda, "MemPool", memory.make_pool)
    monkeypatch.setattr(torch.cuda, "use_mem_pool", memory.use_pool)
    return memory


def load(plan):
    """All projections of all layers, as a GPU holds them."""
    held = []
    for layer in plan.layers:
        held += [gpu_weights.stream_linear(stored) for stored in (layer.qkv, layer.o)]
        if hasattr(layer.mlp, "experts"):
            held.append(gpu_weights.stream_experts(layer.mlp.experts, "shuffled", lambda stored: None))
        else:
            held.append(gpu_weights.stream_linear(layer.mlp.down))
        torch.cuda.empty_cache()
    return held


def stuck_share(plan, memory):
    """What could not be given back after loading, as a share of the weights."""
    with memory:
        held = load(plan)
        memory.settle()
        weights = sum(one.nbytes for one in held)
        return (memory.main.reserved - weights) / weights


def test_packing_leaves_nothing_behind(plan, memory):
    assert stuck_share(plan, memory) < 0.01
    for pool in memory.scratch:
        pool.empty()
        assert pool.reserved == 0


def test_in_one_pool_scratch_would_be_stuck_between_weights(plan, memory, monkeypatch):
    monkeypatch.setattr(gpu_weights, "apart", lambda make: make())
    assert stuck_share(plan, memory) > 0.1


@pytest.mark.gpu
def test_a_gpu_gets_its_scratch_back():
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]

    def make():
        torch.empty(900 * MIB, dtype=torch.uint8, device="cuda")
        return TiledWeight(
            torch.full((462 * MIB,), 3, dtype=torch.uint8, device="cuda"), None, 8, 1, 1, False
        )

    made = scratch.apart(make)
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info()[0] < 500 * MIB
    assert bool((made.tiles == 3).all())

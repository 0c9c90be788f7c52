"""What a step may hold when nobody says: as the device's memory has it."""

from __future__ import annotations

import pytest
import torch

from gpu_worker.engine import memory
from gpu_worker.engine.build import EngineArgs, build_engine
from gpu_worker.engine.memory import GIB, choose_limits, step_tokens
from tests.tiny import make_tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("gib", "num_tokens"), [(8, 2048), (24, 2048), (40, 4096), (63.9, 4096), (79, 8192), (141, 8192)]
)
def test_a_larger_device_takes_longer_steps(gib, num_tokens, monkeypatch):
    assert step_tokens(int(gib * GIB)) == num_tokens
    monkeypatch.setattr(memory, "available_cpu_bytes", lambda: int(gib * GIB))
    assert choose_limits(None, None, CPU) == (256, num_tokens)


def test_what_is_given_stays_and_the_other_follows():
    assert choose_limits(7, 100, CPU) == (7, 100)
    assert choose_limits(None, 100, CPU) == (100, 100)
    num_seqs, num_tokens = choose_limits(10_000, None, CPU)
    assert num_seqs == 10_000 == num_tokens


def test_no_more_sequences_than_blocks_and_no_longer_context_than_the_cache(tmp_path):
    model = make_tiny_model(tmp_path, quantized=False)
    limits = build_engine(EngineArgs(model=model, num_kv_blocks=5, block_size=16)).config.scheduler
    assert (limits.max_num_seqs, limits.max_model_len) == (5, 80)

"""The ranks of a group as processes: they compute as one does; the end of one is said, not waited for."""

import os
import signal

import pytest
import torch

from gpu_worker.engine.build import EngineArgs, build_engine
from gpu_worker.engine.errors import EngineArgsError, RankError
from gpu_worker.engine.followers import pack, sizes_of, unpack
from gpu_worker.engine.profiling import padding_batch
from gpu_worker.engine.sequence import Request
from gpu_worker.sampling_params import SamplingParams
from tests.tiny import make_tiny_model

REQUESTS = [
    Request("greedy", list(range(20, 60)), SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)),
    Request("scored", [5, 6, 7, 8], SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2)),
    # Its completions share the prompt's last block, until each writes into a copy of it.
    Request("several", [9, 10, 11], SamplingParams(seed=3, n=3, max_tokens=20, ignore_eos=True)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"moe_intermediate_size": 128, "moe_num_shared_experts": 0}
    return make_tiny_model(tmp_path_factory.mktemp("model"), quantized=True, **sizes)


def build(model, size):
    args = EngineArgs(
        model=model,
        device="cpu",
        cpu_activations="float32",
        tensor_parallel_size=size,
        block_size=16,
        num_kv_blocks=64,
        max_num_seqs=8,
    )
    return build_engine(args)


def complete(engine):
    """Token ids by request and index."""
    for request in REQUESTS:
        engine.add(request)
    found = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return found


@pytest.fixture(scope="module")
def built(model):
    built = build(model, 2)
    yield built
    built.close()


def test_two_processes_complete_as_one_does(model, built):
    assert complete(built.engine) == complete(build(model, 1).engine)
    assert built.config.tensor_parallel_size == 2
    assert built.failure is None
    assert "rank" in built.description[-1]


def test_the_end_of_a_rank_is_the_end_of_the_engine(built):
    (process,) = built.followers._processes
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(RankError, match="rank 1 of 2 was ended by SIGKILL"):
        complete(built.engine)
    assert built.failure == "rank 1 of 2 was ended by SIGKILL"


def test_a_batch_is_told_whole():
    batch = padding_batch(17, 3, torch.device("cpu"))
    packed = pack(batch)
    found = unpack(sizes_of(batch), lambda room: room.copy_(packed), torch.device("cpu"))
    assert found.max_query_len == batch.max_query_len
    for name in ("input_ids_T", "block_tables_SM", "cu_seqlens_q", "context_lens_S", "sample_rows_S"):
        assert torch.equal(getattr(found, name), getattr(batch, name))
        assert getattr(found, name).dtype == getattr(batch, name).dtype


def test_a_degree_that_the_model_does_not_allow_is_refused_before_any_process_starts(model):
    with pytest.raises(EngineArgsError, match="tensor_parallel_size 3 does not divide the model's 4"):
        build(model, 3)

"""DecodeGraphs, with a fake graph: what was recorded runs again on the same buffers."""

from __future__ import annotations

import torch

from gpu_worker.engine.cuda_graphs import DecodeGraphs, graph_sizes
from gpu_worker.engine.engine import Engine
from gpu_worker.engine.sequence import Request
from gpu_worker.layers.batch import Batch
from gpu_worker.layers.kv_cache import KVCache
from gpu_worker.sampling_params import SamplingParams
from tests.fakes_model import HashModel, engine_config


class PaddedHashModel(HashModel):
    """Counts the forwards that a graph ran, and those that none did."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_sizes: list[int] = []
        self.replayed_sizes: list[int] = []
        self.num_eager = 0
        self.is_replaying = False

    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        self.batch_sizes.append(batch.num_sequences)
        self.num_eager += not self.is_replaying
        if self.is_replaying:
            self.replayed_sizes.append(batch.num_sequences)
        return super().forward(batch, kv_cache)


class FakeCapture:
    """Records like CudaCapture: a first run, then a replay that calls the function on the same buffers."""

    def __init__(self, model: PaddedHashModel) -> None:
        self._model = model
        self.num_captured = 0

    def __call__(self, function):
        self.num_captured += 1
        function()

        def replay() -> None:
            self._model.is_replaying = True
            function()
            self._model.is_replaying = False

        return replay


def make_engine(with_graphs: bool) -> tuple[Engine, PaddedHashModel]:
    config = engine_config(num_blocks=80, max_num_seqs=20)
    model = PaddedHashModel()
    cache = config.cache
    kv_cache = KVCache(1, cache.num_blocks + 1, cache.block_size, 1, 1, cache.dtype, config.device)
    graphs = None
    if with_graphs:
        graphs = DecodeGraphs(model, kv_cache, 20, 16, config.device)
        graphs.capture(FakeCapture(model))
    model.num_eager = 0
    return Engine(config, model, kv_cache, graphs), model


def completions(engine: Engine) -> dict[str, list[int]]:
    result: dict[str, list[int]] = {}
    for i in range(13):
        params = SamplingParams(seed=i, max_tokens=3 + i, ignore_eos=True, temperature=i % 2)
        engine.add(Request(str(i), [2 + i] * (1 + i), params))
    while engine.has_work:
        for output in engine.step():
            result.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check_integrity()
    return result


def test_sizes_waste_little():
    assert graph_sizes(1) == [1]
    assert graph_sizes(4) == [1, 2, 4]
    assert graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert graph_sizes(256)[-1] == 256


def test_graphs_change_no_completion_and_run_every_pure_decode():
    plain, _ = make_engine(with_graphs=False)
    graphed, model = make_engine(with_graphs=True)
    assert completions(graphed) == completions(plain)
    assert model.num_eager < 6  # the steps with a prompt in them
    assert set(model.replayed_sizes) <= set(graph_sizes(20))
    assert len(model.replayed_sizes) > 10


def test_every_size_is_captured_once():
    model = PaddedHashModel()
    config = engine_config()
    capture = FakeCapture(model)
    kv_cache = KVCache(1, 9, 4, 1, 1, torch.float32, config.device)
    DecodeGraphs(model, kv_cache, 20, 16, config.device).capture(capture)
    assert capture.num_captured == len(graph_sizes(20))
    assert model.batch_sizes == list(reversed(graph_sizes(20)))

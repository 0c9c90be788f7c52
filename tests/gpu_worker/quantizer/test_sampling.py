"""What a model writes itself: it begins as it is told, and goes on as the model would."""

import pytest
import torch

from gpu_worker.model.config_reader import read_model_config
from gpu_worker.quantizer import sampling
from gpu_worker.quantizer.runner import LayerRunner
from tests.gpu_worker.quantizer.quantizing import CPU, source, tokens
from tests.tiny import make_tiny_model

LENGTH = 70  # more than a block of the cache


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("full") / "model", quantized=False)


def write(full, openings_SO, on_progress=lambda what, done, total: None):
    return sampling.sample(read_model_config(full), openings_SO, LENGTH, CPU, on_progress)


def test_openings_come_from_the_text():
    text_ST = torch.arange(60).view(3, 20)
    openings_SO = sampling.openings(text_ST, 50)
    assert openings_SO.shape == (50, sampling.OPENING)
    assert (openings_SO.diff(dim=1) == 1).all()
    assert len(openings_SO[:, 0].unique()) > 20


def test_samples_begin_as_told_and_repeat_themselves(full):
    openings_SO = sampling.openings(tokens(), 3)
    first_ST, second_ST = write(full, openings_SO), write(full, openings_SO)
    assert first_ST.shape == (3, LENGTH)
    assert torch.equal(first_ST[:, : sampling.OPENING], openings_SO)
    assert torch.equal(first_ST, second_ST)


def test_the_likeliest_tokens_are_those_without_a_cache(full, monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda chances, _, generator: chances.argmax(-1, keepdim=True))
    written_ST = write(full, sampling.openings(tokens(), 2))
    model = source(full)
    hidden_STD, runner = model.embed(written_ST), LayerRunner(model)
    for layer in range(model.config.num_hidden_layers):
        hidden_STD = runner.run(layer, hidden_STD)
    chosen_ST = (runner.final_norm(hidden_STD) @ model.head()).argmax(-1)
    agreed = chosen_ST[:, sampling.OPENING - 1 : -1] == written_ST[:, sampling.OPENING :]
    assert agreed.float().mean() > 0.95


def test_more_windows_than_are_written_side_by_side(full, monkeypatch):
    monkeypatch.setattr(sampling, "_AT_ONCE", 2)
    seen = []
    written_ST = write(full, sampling.openings(tokens(), 3), lambda *progress: seen.append(progress))
    assert len(written_ST) == 3
    assert seen[-1] == ("sampling", 2 * LENGTH, 2 * LENGTH)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)

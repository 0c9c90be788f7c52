"""The demo model before quantization is its dense source, and transformers agrees with our decoder about it.

Needs the folder that `make demo` builds. genesis.txt is from the World English Bible, which is in the public
domain.
"""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import Ernie4_5_MoeForCausalLM

from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.loader import load_model
from tests.gpu_worker.naive import NaiveRunner
from tests.wint2.dense_reference import load_llama
from wint2.demo.source import DenseModel, fetch

DEMO = Path(__file__).parents[2] / ".demo"
WINDOW = 512

pytestmark = [pytest.mark.demo, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def decoder():
    config = read_model_config(DEMO / "full")
    return load_model(config, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def token_ids():
    text = Path(__file__).with_name("genesis.txt").read_text(encoding="utf-8").replace("\n", " ")
    ids = Tokenizer.from_file(str(DEMO / "full" / "tokenizer.json")).encode(text).ids
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def perplexity(logits_STV, token_ids_ST):
    predicted, wanted = logits_STV[:, :-1].flatten(0, 1), token_ids_ST[:, 1:].flatten()
    return functional.cross_entropy(predicted, wanted).exp().item()


def our_logits(decoder, token_ids_ST):
    windows = [NaiveRunner(decoder, 1, len(ids)).step({0: ids})[0] for ids in token_ids_ST.tolist()]
    return torch.stack(windows)


@torch.no_grad()
def test_perplexity_is_that_of_the_dense_source(decoder, token_ids):
    dense = load_llama(DenseModel.open(fetch(DEMO / "cache")))
    ours = perplexity(our_logits(decoder, token_ids), token_ids)
    source = perplexity(dense(token_ids).logits, token_ids)
    print(f"perplexity: {ours:.3f} as a mixture of experts, {source:.3f} dense")
    assert ours == pytest.approx(source, rel=0.01)
    assert ours < 15


@torch.no_grad()
def test_logits_match_transformers(decoder, token_ids):
    reference = Ernie4_5_MoeForCausalLM.from_pretrained(DEMO / "full", dtype=torch.float32).eval()
    window = token_ids[:1, :256]
    expected = reference(window).logits
    ours = our_logits(decoder, window)
    assert (ours - expected).norm() / expected.norm() < 1e-4
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))

"""Checkpoints of every layout give the same model; what is wrong with one is said at once, and all of it."""

import contextlib
import json
import logging
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from gpu_worker.model.checkpoint import INDEX_NAME, open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.errors import CheckpointError
from gpu_worker.model.k_order import choose_k_order
from gpu_worker.model.loader import load_model
from gpu_worker.model.plan import plan_model
from tests.checkpoints import make_rank_folders
from tests.gpu_worker.naive import NaiveRunner
from tests.tiny import (
    CONFIG,
    QUANTIZATION_CONFIG,
    make_tiny_model,
    paddle_tensors,
    save_hf,
    tiny_weights,
)

TOKENS = list(range(5, 45))
# Four ranks need four KV heads, and 128 rows each of the WINT2 down projections.
WIDE = {"num_key_value_heads": 4, "moe_intermediate_size": 512, "intermediate_size": 256}


def load(path, **options):
    return load_model(read_model_config(path), device=torch.device("cpu"), dtype=torch.float32, **options)


def logits(decoder):
    return NaiveRunner(decoder, 1, len(TOKENS)).step({0: TOKENS})[0]


def plan(path):
    config = read_model_config(path)
    return plan_model(config, open_checkpoint(path))


def problems(path):
    with pytest.raises(CheckpointError) as caught:
        load(path)
    return caught.value.problems


@pytest.fixture
def tiny(tmp_path):
    return make_tiny_model(tmp_path / "hf", quantized=False)


@pytest.fixture
def expected(tiny):
    return logits(load(tiny))


def write_folder(path, tensors, config=CONFIG, shards=1):
    """Paddle's fused names and [in, out] linears, bf16 labelled U16; `shards` files with an index."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    files = {f"model-{i}.safetensors": names[i::shards] for i in range(shards)}
    for file, part in files.items():
        save_numpy({name: tensors[name] for name in part}, path / file, metadata={"format": "np"})
    if shards > 1:
        weight_map = {name: file for file, part in files.items() for name in part}
        (path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return path


@pytest.mark.parametrize("shards", [1, 3])
def test_paddles_fused_transposed_layout_gives_the_same_bits(tmp_path, expected, shards):
    tensors = paddle_tensors(CONFIG, tiny_weights(CONFIG, seed=0))
    assert str(tensors["ernie.norm.weight"].dtype) == "uint16"
    path = write_folder(tmp_path / "paddle", tensors, shards=shards)
    assert torch.equal(logits(load(path)), expected)


def test_a_checkpoint_cut_into_ranks_loads_whole(tmp_path):
    meant = make_rank_folders(tmp_path / "ranks", 2, quantized=False, **WIDE)
    whole = make_tiny_model(tmp_path / "whole", quantized=False, **WIDE)
    save_hf(meant, whole / "model.safetensors")
    ours, theirs = logits(load(tmp_path / "ranks")), logits(load(whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_quantized_ranks_have_scales_of_their_own(tmp_path):
    """Decoded, level times scale is rounded to bfloat16: twice in WINT2."""
    meant = make_rank_folders(tmp_path / "ranks", 4, quantized=True, **WIDE)
    whole = make_tiny_model(tmp_path / "whole", quantized=False, **WIDE)
    save_hf(meant, whole / "model.safetensors")
    for ours, theirs in zip(plan(tmp_path / "ranks").weights(), plan(whole).weights(), strict=True):
        torch.testing.assert_close(ours.dense().float(), theirs.dense().float(), rtol=2**-7, atol=0)


def test_experts_cut_for_four_ranks_stay_quantized_on_one_device(tmp_path, monkeypatch):
    """Each is four that are always chosen together: no rank's scales are lost, and nothing is decoded."""
    make_rank_folders(tmp_path, 4, quantized=True, **WIDE)
    decoder = load(tmp_path)
    assert decoder.layers[2].mlp.num_splits == 4
    assert decoder.memory.device_bytes["experts"] < 1.3 * decoder.memory.stored_bytes["experts"]
    monkeypatch.setattr("gpu_worker.model.loader.shard_plan", lambda plan, config, shard: plan)
    decoded = load(tmp_path)
    assert decoded.layers[2].mlp.num_splits == 1
    # Rounded to bfloat16 where they were decoded, which sends a few tokens to other experts.
    error = (logits(decoder) - logits(decoded)).norm(dim=-1) / logits(decoded).norm(dim=-1)
    assert error.median() < 0.02


def test_a_missing_rank_folder_is_named(tmp_path):
    make_rank_folders(tmp_path, 3, quantized=False, num_attention_heads=3, num_key_value_heads=3)
    (tmp_path / "rank1").rename(tmp_path / "elsewhere")
    assert any("rank1" in problem for problem in problems(tmp_path))


def test_a_head_in_the_file_wins_over_a_config_that_ties_it(tmp_path, tiny, expected):
    tensors = load_file(tiny / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, tiny / "model.safetensors")
    torch.testing.assert_close(logits(load(tiny)), 2 * expected)


def test_mtp_tensors_are_skipped_with_a_note_and_unknown_ones_named(tiny, expected, caplog):
    tensors = load_file(tiny / "model.safetensors")
    tensors |= {f"model.mtp_{name}.0.weight": torch.ones(3) for name in ("emb_norm", "linear_proj")}
    tensors["model.layers.0.rotary.inv_freq"] = torch.ones(3)
    save_file(tensors, tiny / "model.safetensors")
    with caplog.at_level(logging.INFO):
        assert torch.equal(logits(load(tiny)), expected)
    assert "2 tensors of the multi-token-prediction block skipped" in caplog.text
    assert "model.layers.0.rotary.inv_freq" in caplog.text


def test_everything_that_is_wrong_is_said_at_once(tiny):
    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 64)
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"] = torch.zeros(64, 64, dtype=torch.int32)
    save_file(tensors, tiny / "model.safetensors")
    assert set(problems(tiny)) == {
        "model.norm.weight: missing",
        "model.layers.0.self_attn.q_proj.weight: expected bfloat16 or float16 or float32 [64, 64], "
        "model.safetensors has float32 [3, 64]",
        "model.layers.1.mlp.experts.2.down_proj.weight: expected bfloat16 or float16 or float32 [64, 64], "
        "model.safetensors has int32 [64, 64]",
    }


def test_an_index_may_not_lead_out_of_the_folder(tiny):
    secret = tiny.parent / "secret.safetensors"
    (tiny / "model.safetensors").rename(secret)
    for name in ("../secret.safetensors", str(secret), ".."):
        (tiny / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert "is not a plain name in this folder" in problems(tiny)[0]


def test_an_index_may_not_name_a_link_out_of_the_folder(tiny):
    secret = tiny.parent / "secret.safetensors"
    (tiny / "model.safetensors").rename(secret)
    (tiny / "linked.safetensors").symlink_to(secret)
    (tiny / INDEX_NAME).write_text(json.dumps({"weight_map": {"model.norm.weight": "linked.safetensors"}}))
    (problem,) = problems(tiny)
    assert problem.endswith(f"file 'linked.safetensors' is a link to {secret}, outside this folder")


def test_hugging_faces_cache_is_made_of_links(tiny, expected):
    blobs, snapshot = tiny.parent / "blobs", tiny.parent / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(tiny.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    names = plan(snapshot).weights()
    weight_map = dict.fromkeys((weight.name for weight in names), "model.safetensors")
    (snapshot / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(load(snapshot)), expected)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "model_state.pdparams"])
def test_weights_of_another_kind_are_named_and_never_opened(tiny, name):
    (tiny / "model.safetensors").unlink()
    os.mkfifo(tiny / name)  # opening it would wait for ever
    message = f"no *.safetensors file in it; {name} is not read, convert it to safetensors first"
    assert problems(tiny) == (f"{tiny}: {message}",)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(tiny, make):
    make(tiny / "other.safetensors")
    assert problems(tiny) == (f"{tiny / 'other.safetensors'}: not a file",)
    make(tiny / INDEX_NAME)
    assert "no valid index" in problems(tiny)[0]


names = st.text(max_size=9) | st.sampled_from(["", ".", "..", "a/b", "\0", "\ud800", "é" * 200, "model", "/"])
indexes = st.fixed_dictionaries(
    {
        "weight_map": st.dictionaries(
            st.text(max_size=9), names.map(lambda name: f"{name}.safetensors") | names
        )
    }
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(indexes.map(json.dumps) | st.text(max_size=60) | st.binary(max_size=60))
def test_any_index_opens_the_folders_own_files_or_is_a_problem(tmp_path, index):
    content = index if isinstance(index, bytes) else index.encode("utf-8", "replace")
    (tmp_path / INDEX_NAME).write_bytes(content)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with contextlib.suppress(CheckpointError):
        (tensors,) = open_checkpoint(tmp_path).ranks
        assert set(tensors) <= {"a"}


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_a_broken_index_is_one_message(tiny, text):
    (tiny / INDEX_NAME).write_text(text)
    assert "no valid index" in problems(tiny)[0]


def trained_looking(config):
    """Tiny weights whose experts have hidden features of many sizes, as training leaves them."""
    weights = tiny_weights(config, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, weight in weights.items():
        if ".experts." in name and "gate_proj" in name:
            size = torch.empty(len(weight)).log_normal_(0, 0.5, generator=generator).bfloat16()
            for part in ("gate_proj", "up_proj"):
                weights[name.replace("gate_proj", part)] *= size.unsqueeze(1)
            weights[name.replace("gate_proj", "down_proj")] *= size
    return weights


@pytest.mark.parametrize("k_order", ["shuffled", "natural"])
def test_the_order_of_rows_is_found_out(tmp_path, caplog, k_order):
    config = CONFIG | {"moe_intermediate_size": 256, "quantization_config": QUANTIZATION_CONFIG}
    path = write_folder(tmp_path / "model", paddle_tensors(config, trained_looking(config), k_order), config)
    with caplog.at_level(logging.INFO):
        decoder = load(path)
    assert f"in {k_order} order (correlation of 4 experts' norms" in caplog.text
    assert torch.equal(logits(decoder), logits(load(path, k_order=k_order)))
    other = "natural" if k_order == "shuffled" else "shuffled"
    assert not torch.allclose(logits(decoder), logits(load(path, k_order=other)), atol=0.1)


def test_without_evidence_the_newer_order_is_assumed_and_said(tmp_path):
    path = make_tiny_model(tmp_path, quantized=True)
    finding = choose_k_order(plan(path), "auto")
    assert finding.k_order == "shuffled"
    assert "undecided" in finding.evidence
    assert choose_k_order(plan(path), "natural").evidence == "as asked"
    assert choose_k_order(plan(path), "auto", recorded="natural").evidence == "as config.json says"


def test_a_model_without_wint2_has_no_order_to_find(tiny):
    assert choose_k_order(plan(tiny), "auto") is None

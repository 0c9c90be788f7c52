"""A family's whole journey: `wint2 quantize`, load, serve by `LLM`, and transformers' own completions of the
very weights that were written."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.families import FAMILIES
from gpu_worker.model.plan import plan_model
from gpu_worker.model.stored_weight import StoredLinear
from tests.gpu_worker.test_families import DOTS, EXPERTS, load_reference, save_random
from tests.tiny import decode_stored, make_tiny_model, write_tokenizer
from wint2 import LLM, SamplingParams
from wint2.cli import main

SMALL = {"vocab_size": 300, "num_hidden_layers": 2}
MODELS = {
    "ernie4_5_moe": {},
    "qwen3_moe": EXPERTS | {"num_experts": 3, "norm_topk_prob": True},
    "qwen2_moe": EXPERTS | {"num_experts": 3, "shared_expert_intermediate_size": 72},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
    "deepseek": DOTS | {"n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots1": DOTS | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
}
QUICK = (
    "--num-windows 4 --window 32 --held-out-windows 1 --effort fast --min-rows 8 --no-correct --device cpu"
)
PROMPTS = [[5, 17, 200, 31, 8], [44] * 20 + [7, 8, 9]]
NUM_TOKENS = 64


@pytest.fixture(params=MODELS, scope="module")
def folders(request, tmp_path_factory):
    """A full-precision checkpoint, and what `wint2 quantize` made of it."""
    path, family = tmp_path_factory.mktemp(request.param), request.param
    if family == "ernie4_5_moe":
        make_tiny_model(path / "full", quantized=False, num_hidden_layers=3)
    else:
        save_random(path / "full", family, SMALL | MODELS[family])
        write_tokenizer(path / "full")
    text = path / "text.txt"
    text.write_text("In the beginning God created the heaven and the earth. " * 40)
    words = ["quantize", str(path / "full"), str(path / "out"), "--calibration", str(text)]
    main([*words, *QUICK.split(), "--wint4-end-layer", "-1"])
    return path / "full", path / "out"


@pytest.fixture(scope="module")
def reference(folders, tmp_path_factory):
    """transformers' model, its weights those that the quantized files stand for."""
    full, quantized = folders
    copy = shutil.copytree(full, tmp_path_factory.mktemp("decoded") / "model")
    tensors = {name: tensor.float() for name, tensor in load_file(full / "model.safetensors").items()}
    meant = [weight for weight in read_plan(quantized).weights() if not is_zero_bias(weight)]
    for theirs, ours in zip(read_plan(full).weights(), meant, strict=True):
        for name, tensor in decoded(theirs, ours).items():
            tensors[name] = tensor.view_as(tensors[name])
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return load_reference(copy)


def read_plan(path):
    config = read_model_config(path)
    return plan_model(config, open_checkpoint(path))


def is_zero_bias(weight):
    """Of a router that has none in the family's own files."""
    return "correction_bias" in weight.name and not weight.dense().any()


def decoded(theirs, ours):
    """Our stored weight under the names of the family's tensors, its rotary pairs taken apart again."""
    is_linear = isinstance(ours, StoredLinear)
    places = list(theirs.ranks[0].values()) if is_linear else theirs.ranks
    whole = ours.dense().float()
    if is_linear and ours.format != "none":
        whole = decode_stored(ours.read(), ours.num_inputs).T
    if theirs.halves is not None:
        rows = whole[: theirs.halves.num_rows].unflatten(0, (-1, theirs.halves.head_dim // 2, 2))
        whole = torch.cat([rows.transpose(1, 2).flatten(0, 2), whole[theirs.halves.num_rows :]])
    pieces = whole.split([place.shape[0] for place in places]) if len(places) > 1 else (whole,)
    return {place.name: piece.contiguous() for place, piece in zip(places, pieces, strict=True)}


def test_every_family_makes_the_journey():
    assert set(MODELS) == set(FAMILIES)


def test_it_is_quantized(folders):
    formats = {weight.format for weight in read_plan(folders[1]).weights()}
    assert formats == {"none", "wint8", "wint2"}


def test_what_is_served_is_what_transformers_computes(folders, reference):
    llm = LLM(folders[1], num_kv_blocks=32, block_size=16, max_num_seqs=4, cpu_activations="float32")
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "eos_token_id": None}
        expected = reference.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        assert output.outputs[0].token_ids == expected
        scores = reference(torch.tensor([prompt + expected])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        ours = [
            place[token].logprob for place, token in zip(output.outputs[0].logprobs, expected, strict=True)
        ]
        theirs = scores.gather(1, torch.tensor([expected]).T).squeeze(1)
        torch.testing.assert_close(torch.tensor(ours), theirs.detach(), rtol=1e-3, atol=1e-3)

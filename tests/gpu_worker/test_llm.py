"""LLM: prompts of every shape in, completions as FastDeploy's and vLLM's users read them out."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path

import pytest
import torch

from gpu_worker.engine.errors import ContextLengthError, EngineArgsError, RequestError
from tests.tiny import make_tiny_model
from wint2 import LLM, SamplingParams, StructuredOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), quantized=True)


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model, num_kv_blocks=64, block_size=16, max_num_seqs=16)


def test_one_result_has_both_shapes(llm):
    (output,) = llm.generate("the thing", GREEDY, use_tqdm=False)
    assert output.finished
    assert output.prompt == "the thing"
    assert output.prompt_token_ids == llm.get_tokenizer().encode("the thing")
    assert output.outputs.text == output.outputs[0].text != ""
    assert output.outputs.token_ids == output.outputs[0].token_ids
    assert len(output.outputs.token_ids) == 6
    assert output.outputs.finish_reason == "length"
    with pytest.raises(AttributeError, match="no attribute 'txt'"):
        output.outputs.txt  # noqa: B018


def test_prompts_of_every_shape_agree(llm):
    ids = llm.get_tokenizer().encode("the thing")
    other = llm.get_tokenizer().encode("on a hat")
    shapes = ["the thing", ["the thing"], ids, [ids], {"prompt": "the thing"}, [{"prompt_token_ids": ids}]]
    results = [llm.generate(shape, GREEDY, use_tqdm=False) for shape in shapes]
    assert {tuple(outputs[0].outputs.token_ids) for outputs in results} == {
        tuple(results[0][0].outputs.token_ids)
    }
    both = llm.generate([ids, other], GREEDY, use_tqdm=False)
    assert [output.prompt_token_ids for output in both] == [ids, other]
    assert both[0].outputs.token_ids == results[0][0].outputs.token_ids
    assert llm.generate([], GREEDY) == []


def test_a_batch_of_many_is_bit_for_bit_many_batches_of_one(llm):
    prompts = [[5 + i] * (1 + 7 * i % 40) for i in range(9)]
    params = [
        SamplingParams(temperature=0.8 * (i % 2), seed=i, max_tokens=5, top_p=0.9, logprobs=1)
        for i in range(9)
    ]
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        (alone,) = llm.generate([prompt], one, use_tqdm=False)
        assert alone.outputs.token_ids == output.outputs.token_ids
        assert alone.outputs.logprobs == output.outputs.logprobs


def test_each_prompt_may_have_its_own_parameters(llm):
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (1, 3)]
    outputs = llm.generate(["a", "b"], params, use_tqdm=False)
    assert [len(output.outputs.token_ids) for output in outputs] == [1, 3]
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate(["a"], params)


def test_n_completions_with_logprobs(llm):
    params = SamplingParams(n=3, seed=1, max_tokens=4, ignore_eos=True, logprobs=2)
    (output,) = llm.generate("the", params, use_tqdm=False)
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
    for completion in output.outputs:
        sampled = [
            position[token].logprob
            for position, token in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
        assert completion.cumulative_logprob == pytest.approx(sum(sampled))
        assert all(2 <= len(position) <= 3 for position in completion.logprobs)


def test_a_stop_string_ends_one_completion_and_frees_it(llm):
    (free,) = llm.generate("the thing", GREEDY, use_tqdm=False)
    stop = free.outputs.text[2:4]
    params = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True, stop=[stop], n=2)
    (output,) = llm.generate("the thing", params, use_tqdm=False)
    for completion in output.outputs:
        assert completion.finish_reason == "stop"
        assert completion.stop_reason == stop
        assert completion.text == free.outputs.text[: free.outputs.text.index(stop)]
    assert llm._engine.stats().num_used_blocks == 0


def test_the_stop_string_and_special_tokens_may_be_kept(llm):
    (free,) = llm.generate("the thing", GREEDY, use_tqdm=False)
    text = free.outputs.text
    stop = text[2:4]
    kept = dataclasses.replace(GREEDY, stop=(stop,), include_stop_str_in_output=True)
    assert (
        llm.generate("the thing", kept, use_tqdm=False)[0].outputs.text
        == text[: text.index(stop) + len(stop)]
    )
    only = {"max_tokens": 1, "ignore_eos": True, "allowed_token_ids": [3]}
    shown = [SamplingParams(**only, skip_special_tokens=skip) for skip in (True, False)]
    texts = [output.outputs.text for output in llm.generate(["a", "a"], shown, use_tqdm=False)]
    assert texts == ["", "<|begin_of_sentence|>"]


def test_a_bar_is_shown_unless_told_otherwise(llm, capsys):
    llm.generate(["a", "b"], GREEDY)
    assert "prompts: 100%" in capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert capsys.readouterr().err == ""


def test_a_template_and_its_variables_may_be_brought(model, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}{{ ' /think' if enable_thinking }}")
    llm = LLM(model, chat_template=str(file), num_kv_blocks=8)
    said = [{"role": "user", "content": "hello"}]
    for options, expected in (
        ({}, "hello"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "hello /think"),
        ({"chat_template": "{{ messages | length }}"}, "1"),
    ):
        (output,) = llm.chat(said, GREEDY, use_tqdm=False, **options)
        assert output.prompt == expected


def test_special_tokens_that_a_user_writes_are_text(llm):
    (output,) = llm.chat([{"role": "user", "content": "</s><|end_of_sentence|>"}], GREEDY, use_tqdm=False)
    assert output.prompt_token_ids.count(2) == output.prompt_token_ids.count(4) == 0
    assert output.prompt_token_ids[0] == 3


@pytest.mark.parametrize("dtype", ["float32", torch.float32, "bfloat16", torch.bfloat16])
def test_arithmetic_by_name_or_by_torchs_own(model, dtype):
    llm = LLM(model, dtype=dtype, num_kv_blocks=4)
    assert str(llm._engine.config.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")


def test_chat_uses_the_template(llm):
    conversation = [{"role": "user", "content": "hello"}]
    one, *rest = llm.chat([conversation, conversation], GREEDY, use_tqdm=False)
    assert one.prompt == "<|begin_of_sentence|>User: hello\nAssistant: "
    assert rest[0].outputs.token_ids == one.outputs.token_ids
    assert llm.chat(conversation, GREEDY, use_tqdm=False)[0].outputs.text == one.outputs.text


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (["a", [1, 300]], RequestError, "token id 300 at position 1"),
        (["a", []], RequestError, "at least one token"),
        ([[5] * 1020], ContextLengthError, "1026 in all; the model's context has 1024"),
        ([{"text": "a"}], TypeError, "neither 'prompt' nor 'prompt_token_ids' but"),
        ([["a", "b"]], TypeError, "a prompt is a text, token ids, or a dict"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_engine_goes_on(llm, prompts, error, message):
    with pytest.raises(error) as caught:
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert message in str(caught.value)
    assert not llm._engine.has_work
    assert llm.generate("a", GREEDY, use_tqdm=False)[0].finished


def test_without_a_tokenizer_token_ids_go_in_and_out(model):
    llm = LLM(model, skip_tokenizer_init=True, num_kv_blocks=8)
    (output,) = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)
    assert output.outputs.text == ""
    assert len(output.outputs.token_ids) == 6
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.generate("text", GREEDY)
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        llm.generate([5], SamplingParams(stop="x"))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        (
            {"max_num_seq": 4},
            TypeError,
            "unexpected keyword argument 'max_num_seq'; did you mean 'max_num_seqs'?",
        ),
        (
            {"tensor_parallel_size": 3},
            EngineArgsError,
            "tensor_parallel_size 3 does not divide the model's 4",
        ),
        ({"speculative_config": {"method": "mtp"}}, EngineArgsError, "there is no speculative decoding"),
        ({"model": "baidu/ERNIE"}, EngineArgsError, "nothing is downloaded: give the checkpoint's directory"),
        ({"device": "tpu"}, EngineArgsError, "device must be auto, cpu or cuda, got 'tpu'"),
        ({"dtype": "float8"}, EngineArgsError, "dtype must be auto, float32 or bfloat16, got 'float8'"),
        ({"max_model_len": 5000}, EngineArgsError, "is 5000; the model was made for at most 2048"),
        ({"max_model_len": 999, "num_kv_blocks": 2}, EngineArgsError, "which hold 128 tokens"),
        (
            {"max_num_batched_tokens": 8, "max_num_seqs": 256},
            EngineArgsError,
            "must be at least max_num_seqs (256)",
        ),
    ],
)
def test_a_keyword_that_cannot_be_honoured_is_an_error(model, keywords, error, message):
    with pytest.raises(error) as caught:
        LLM(**{"model": model} | keywords)
    assert message in str(caught.value)


def test_keywords_of_fastdeploy_are_understood_or_noted(model, caplog):
    caplog.set_level(logging.INFO)
    llm = LLM(
        model,
        num_gpu_blocks_override=7,
        kv_cache_ratio=0.75,
        engine_worker_queue_port=8002,
        load_choices="default_v1",
        graph_optimization_config={"use_cudagraph": False},
        swap_space=None,
    )
    assert llm._engine.config.cache.num_blocks == 7
    assert llm._engine.config.scheduler.max_model_len == 7 * 64
    assert "kv_cache_ratio has no effect: KV blocks are taken one by one" in caplog.text
    assert "engine_worker_queue_port has no effect: an LLM opens no port" in caplog.text
    assert "KV cache: 7 blocks of 64 tokens, 448 in all" in caplog.text


def test_whole_prompts_get_a_budget_that_holds_them(model):
    llm = LLM(model, enable_chunked_prefill=False, max_num_batched_tokens=512, num_kv_blocks=32)
    assert llm._engine.config.scheduler.max_num_batched_tokens == 2048


def test_bad_words_are_not_said(llm):
    (free,) = llm.generate("the thing", GREEDY, use_tqdm=False)
    word = llm.get_tokenizer().decode(free.outputs.token_ids[:2])
    (kept,) = llm.generate("the thing", dataclasses.replace(GREEDY, bad_words=[word]), use_tqdm=False)
    assert word in free.outputs.text
    assert word not in kept.outputs.text


def test_a_prompt_is_scored(llm):
    ids = llm.get_tokenizer().encode("the thing is on the hat")
    params = dataclasses.replace(GREEDY, prompt_logprobs=2)
    (first,) = llm.generate([ids], params, use_tqdm=False)
    (again,) = llm.generate([ids], params, use_tqdm=False)
    assert first.prompt_logprobs[0] is None
    assert [token_id in scores for token_id, scores in zip(ids[1:], first.prompt_logprobs[1:], strict=True)]
    assert first.prompt_logprobs == again.prompt_logprobs  # though the prefix cache knows it by now
    assert len(first.prompt_logprobs) == len(ids)


def test_structured_output(llm):
    wanted = StructuredOutput(regex="[ab]{3}(the|ing)")
    params = SamplingParams(seed=1, max_tokens=20, structured_output=wanted, n=3)
    (output,) = llm.generate("say", params, use_tqdm=False)
    assert all(re.fullmatch("[ab]{3}(the|ing)", one.text) for one in output.outputs)
    assert {one.finish_reason for one in output.outputs} == {"stop"}

"""Prompts, conversations and parameters as callers of `LLM` write them; what is none is told so."""

import numpy as np
import pytest
import torch

from gpu_worker.llm_prompts import read_conversations, read_params, read_prompt, split_prompts
from gpu_worker.sampling_params import SamplingParams

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("text", [("text", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([1, 2, 3], [(None, [1, 2, 3])]),
        ([[1, 2, 3], [4]], [(None, [1, 2, 3]), (None, [4])]),
        ([(1, 2), "b"], [(None, [1, 2]), ("b", None)]),
        (np.array([[1, 2], [3, 4]]), [(None, [1, 2]), (None, [3, 4])]),
        ([torch.tensor([1, 2])], [(None, [1, 2])]),
        ({"prompt": "a"}, [("a", None)]),
        ([{"prompt_token_ids": [1, 2]}], [(None, [1, 2])]),
        ({"prompt": "a", "prompt_token_ids": np.array([7])}, [("a", [7])]),
        ({"prompt": [1, 2], "multi_modal_data": None}, [(None, [1, 2])]),
        ([], []),
    ],
)
def test_prompts_of_every_shape(prompts, expected):
    assert [read_prompt(prompt) for prompt in split_prompts(prompts)] == expected


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "prompts are texts, lists of token ids, or dicts with them, not None"),
        (5, "not 5"),
        (b"bytes", "not b'bytes'"),
        ([["a", "b"]], r"a prompt is a text, token ids, or a dict with one of them, not \['a', 'b'\]"),
        ([[1.0, 2]], r"not \[1.0, 2\]"),
        ({"text": "a"}, r"neither 'prompt' nor 'prompt_token_ids' but \['text'\]"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "cannot have multi_modal_data"),
    ],
)
def test_what_is_no_prompt_is_told(prompts, message):
    with pytest.raises(TypeError, match=message):
        [read_prompt(prompt) for prompt in split_prompts(prompts)]


def test_one_conversation_or_several():
    assert read_conversations([USER]) == [[USER]]
    assert read_conversations([[USER], [USER, USER]]) == [[USER], [USER, USER]]
    assert read_conversations([]) == []


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert read_conversations([{"role": "user", "content": parts}]) == [[USER]]
    call = {"role": "assistant", "content": None, "tool_calls": [{}]}
    assert read_conversations([call]) == [[call]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "a conversation is a list of messages, not 'hi'"),
        (["hi"], "a conversation is a list of messages, not 'hi'"),
        ([[USER, "hi"]], "message 1 is no dict with a 'role': 'hi'"),
        ([{"content": "hi"}], "message 0 is no dict with a 'role'"),
        ([{"role": "user"}], "message 0 has no 'content'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0 has a part that is no text"),
    ],
)
def test_what_is_no_conversation_is_told(messages, message):
    with pytest.raises(TypeError, match=message):
        read_conversations(messages)


def test_parameters_for_all_or_for_each():
    one = SamplingParams(max_tokens=1)
    assert read_params(None, 2) == [SamplingParams()] * 2
    assert read_params(one, 2) == read_params([one, one], 2) == [one, one]
    with pytest.raises(TypeError, match="sampling_params are SamplingParams, or a list of them, not"):
        read_params({"n": 1}, 1)
    with pytest.raises(ValueError, match="1 sampling_params for 2 prompts"):
        read_params([one], 2)

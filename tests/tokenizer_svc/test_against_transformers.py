"""The same ids and texts as Hugging Face's tokenizers, on the same files."""

import json

import pytest
from hypothesis import given, settings

from tests.tokenizer_svc.folders import HARD_STRINGS, sentencepiece_folder, texts
from tokenizer_svc.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers")

CONVERSATIONS = [
    [{"role": "user", "content": "Hello, wie geht's?"}],
    [
        {"role": "system", "content": "Be brief.\n"},
        {"role": "user", "content": " 你好 👩‍👩‍👧 "},
        {"role": "assistant", "content": "Hi <b>there</b> <"},
        {"role": "user", "content": "   "},
    ],
]


@pytest.fixture(scope="session")
def reference(folders, kind):
    """transformers' tokenizer of the same folder: the slow one for sentencepiece, else the fast one."""
    folder = folders[kind]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = {name: value for name, value in config.items() if name.endswith("_token")}
    if kind != "sentencepiece":
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder / "tokenizer.json"), chat_template=config["chat_template"], **names
        )
    added = json.loads((folder / "added_tokens.json").read_text())
    tokenizer = transformers.tokenization_utils_sentencepiece.SentencePieceBackend(
        vocab_file=str(folder / "tokenizer.model"), chat_template=config["chat_template"], **names
    )
    control = {content: content != "<think>" for content in added}
    for content, is_special in control.items():
        tokenizer.add_tokens([content], special_tokens=is_special)
    assert {content: tokenizer.convert_tokens_to_ids(content) for content in added} == added
    return tokenizer


@pytest.fixture(scope="session", params=[False, True], ids=["plain", "space first"])
def fast(request, tmp_path_factory):
    """Ours and transformers' fast tokenizer of one sentencepiece model, and whether it puts a space first."""
    folder = sentencepiece_folder(tmp_path_factory.mktemp("fast") / "it", add_dummy_prefix=request.param)
    theirs = transformers.LlamaTokenizerFast.from_pretrained(folder, add_prefix_space=request.param)
    assert theirs.is_fast
    return load_tokenizer(folder), theirs, request.param


def equals_fast(fast, text):
    """The fast one puts no space before a space, nor after an added token; sentencepiece and the slow do."""
    ours, theirs, is_space_first = fast
    ids = ours.encode(text, add_special_tokens=False, parse_special_tokens=True)
    added = ours._model.added.split(text, parse_special=True)
    if is_space_first and (text[:1] in (" ", "▁") or any(isinstance(segment, int) for segment in added)):
        return True
    return ids == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", HARD_STRINGS)
def test_hard_strings_by_the_fast_tokenizer(fast, text):
    assert equals_fast(fast, text)


@given(text=texts)
@settings(max_examples=300)
def test_any_string_by_the_fast_tokenizer(fast, text):
    assert equals_fast(fast, text)


@pytest.mark.parametrize("text", HARD_STRINGS)
def test_hard_strings(tokenizer, reference, text):
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=True)
    assert ids == reference.encode(text, add_special_tokens=False)


@given(text=texts)
@settings(max_examples=300)
def test_any_string(tokenizer, reference, text):
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=True)
    assert ids == reference.encode(text, add_special_tokens=False)


@given(text=texts)
def test_decoded_text(tokenizer, reference, kind, text):
    if kind == "sentencepiece":
        pytest.skip("transformers' sentencepiece backend decodes no bytes")
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special_tokens=True)
    for skip in (True, False):
        expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations(tokenizer, reference, messages, add_generation_prompt):
    text, ids = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    options = {"add_generation_prompt": add_generation_prompt}
    assert text == reference.apply_chat_template(messages, tokenize=False, **options)
    assert ids == reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

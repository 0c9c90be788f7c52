"""A folder that is wrong gets one error that says all of it."""

import json
import shutil

import pytest

from tokenizer_svc.errors import TokenizerLoadError
from tokenizer_svc.tokenizer import load_tokenizer


def problems_of(path, **options):
    with pytest.raises(TokenizerLoadError) as error:
        load_tokenizer(path, **options)
    assert str(error.value) == "; ".join(error.value.problems)
    assert "\n" not in str(error.value)
    return error.value.problems


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of a good folder, to break."""

    def copy(kind):
        return shutil.copytree(folders[kind], tmp_path / kind)

    return copy


def test_no_folder(tmp_path):
    assert problems_of(tmp_path / "none") == [f"{tmp_path / 'none'}: no such directory"]
    (tmp_path / "file").touch()
    assert problems_of(tmp_path / "file") == [f"{tmp_path / 'file'}: not a directory"]


def test_an_empty_folder(tmp_path):
    assert problems_of(tmp_path) == [f"{tmp_path}: holds neither tokenizer.json nor tokenizer.model"]


@pytest.mark.parametrize("content", [b"", b"\x00\x01garbage", b'{"model": {}}'])
def test_tokenizer_model_that_is_none(broken, content):
    folder = broken("sentencepiece")
    (folder / "tokenizer.model").write_bytes(content)
    (problem,) = problems_of(folder)
    assert problem.startswith(f"{folder / 'tokenizer.model'}: not a sentencepiece model")


@pytest.mark.parametrize("num_bytes", [1, 100, 3000])
def test_tokenizer_model_cut_short(broken, num_bytes):
    folder = broken("sentencepiece")
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:num_bytes])
    (problem,) = problems_of(folder)
    assert problem.startswith(f"{path}: not a sentencepiece model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "holds a list, not an object"),
        ("{}", "not a tokenizer that the tokenizers library can read"),
        ('{"model": {"type": "BPE"}}', "not a tokenizer that the tokenizers library can read"),
    ],
)
def test_tokenizer_json_that_is_none(broken, content, message):
    folder = broken("byte_level")
    (folder / "tokenizer.json").write_text(content)
    (problem,) = problems_of(folder)
    assert problem.startswith(f"{folder / 'tokenizer.json'}: ")
    assert message in problem


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (None, '"decoder" is null'),
        ({"type": "WordPiece", "prefix": "##", "cleanup": True}, "is not supported"),
    ],
)
def test_a_decoder_that_joins_no_bytes(broken, decoder, message):
    folder = broken("byte_level")
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**spec, "decoder": decoder}))
    (problem,) = problems_of(folder)
    assert message in problem


def test_all_problems_at_once(broken):
    folder = broken("sentencepiece")
    (folder / "tokenizer_config.json").write_text('{"a": 1,}')
    (folder / "special_tokens_map.json").write_text('"text"')
    (folder / "added_tokens.json").write_text('{"<x>": "7"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": "2"}')
    (folder / "chat_template.jinja").write_text("\n{% if %}")
    problems = problems_of(folder)
    assert len(problems) == 5
    for start, problem in zip(
        ["tokenizer_config.json: not valid JSON", "special_tokens_map.json: holds a str, not an object"],
        problems,
        strict=False,
    ):
        assert problem.startswith(f"{folder}/{start}")
    text = "; ".join(problems)
    assert "chat template: line 2: Expected an expression" in text
    assert "eos_token_id is '2', not one or more token ids" in text
    assert "added_tokens.json: '<x>' has '7' where an id belongs" in text


def test_text_that_is_not_utf_8(broken):
    folder = broken("byte_level")
    (folder / "chat_template.jinja").write_bytes(b"abc\xff")
    (problem,) = problems_of(folder)
    assert problem == f"{folder / 'chat_template.jinja'}: not UTF-8 text: invalid start byte at byte 3"


def test_a_chat_template_file_that_is_not_there(folders, tmp_path):
    path = str(tmp_path / "none.jinja")
    assert problems_of(folders["byte_level"], chat_template=path) == [f"{path}: no such chat template file"]


def test_added_tokens_of_the_config_count(broken):
    folder = broken("sentencepiece")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"700": {"content": "<|far|>", "special": True}, "x": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<|far|>", parse_special_tokens=True) == [700]
    assert tokenizer.info.vocab_size == 701
    assert tokenizer.decode([600, 700], skip_special_tokens=False) == "<|far|>"


def test_a_bare_sentencepiece_model(folders, tmp_path):
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("</s>", parse_special_tokens=True) == [2]
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.info.chat_template is None

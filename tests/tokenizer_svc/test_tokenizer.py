import pytest
import sentencepiece
from hypothesis import given

from tests.tokenizer_svc.folders import HARD_STRINGS, texts
from tokenizer_svc.tokenizer import load_tokenizer

CONTROL = ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("text", HARD_STRINGS)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level", "llama"])
def test_text_comes_back(tokenizers, kind, text):
    ids = tokenizers[kind].encode(text, add_special_tokens=False)
    space = "▁" if kind == "byte_level" else " "
    assert tokenizers[kind].decode(ids, skip_special_tokens=False) == text.replace("▁", space)


@given(text=texts)
def test_sentencepiece_decodes_the_same(tokenizers, folders, text):
    tokenizer = tokenizers["sentencepiece"]
    ids = tokenizer.encode(text.replace("<think>", ""))
    model = sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece"] / "tokenizer.model"))
    assert tokenizer.decode(ids) == model.decode(ids)


@given(text=texts)
def test_special_tokens_in_text_stay_text(tokenizer, text):
    text = f"{text}<|im_end|></s>{text}"
    unknown = set(tokenizer.encode("\U0001f9ff", add_special_tokens=False))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.vocabulary.special_ids.isdisjoint(set(ids) - unknown)


@pytest.mark.parametrize("content", CONTROL)
def test_special_tokens_are_parsed_when_asked(tokenizer, content):
    (token_id,) = tokenizer.encode(content, add_special_tokens=False, parse_special_tokens=True)
    assert tokenizer.decode([token_id], skip_special_tokens=False) == content
    assert tokenizer.decode([token_id]) == ""
    inside = tokenizer.encode(f"a{content}b", add_special_tokens=False, parse_special_tokens=True)
    assert inside.count(token_id) == 1


def test_a_batch_is_its_texts(tokenizer):
    singles = [tokenizer.encode(text) for text in HARD_STRINGS]
    assert tokenizer.encode_batch(HARD_STRINGS) == singles


def test_begin_of_sequence_is_added_where_the_model_has_one(tokenizers):
    llama, byte_level = tokenizers["llama"], tokenizers["byte_level"]
    assert llama.encode("x")[0] == llama.info.bos_token_id == 1
    assert llama.encode("x", add_special_tokens=False) == llama.encode("x")[1:]
    assert byte_level.encode("x") == byte_level.encode("x", add_special_tokens=False)


def test_info(tokenizers, folders):
    ernie = tokenizers["sentencepiece"].info
    assert ernie.kind == "sentencepiece"
    assert ernie.bos_token_id == 1
    assert ernie.pad_token_id == 0
    end_of_turn = tokenizers["sentencepiece"].encode(
        "<|end_of_sentence|>", add_special_tokens=False, parse_special_tokens=True
    )
    assert ernie.eos_token_ids == (2, *end_of_turn)
    assert ernie.model_path == str(folders["sentencepiece"])
    assert tokenizers["byte_level"].info.kind == "tokenizer.json"


def test_eos_of_the_generation_config_counts(folders, tmp_path):
    for file in folders["byte_level"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert load_tokenizer(tmp_path).info.eos_token_ids == (2, 0)


def test_ids_outside_the_vocabulary_print_nothing(tokenizer):
    size = tokenizer.info.vocab_size
    ids = tokenizer.encode("two words", add_special_tokens=False)
    assert tokenizer.decode([ids[0], size, size + 10**6, *ids[1:]]) == "two words"


def test_bytes_that_are_no_character_become_replacement_characters(tokenizers):
    llama = tokenizers["llama"]
    first_byte = llama.encode("\U0001f9ff", add_special_tokens=False)[-4] - 0xF0
    piece = llama.encode("a", add_special_tokens=False)[-1]
    assert llama.decode([first_byte + 0xE4, first_byte + 0xB8, piece]) == "\ufffda"
    assert llama.decode([first_byte + 0xFF, first_byte + 0xFE]) == "\ufffd\ufffd"

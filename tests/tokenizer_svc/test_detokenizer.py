import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer_svc.folders import HARD_STRINGS, texts
from tokenizer_svc.detokenizer import IncrementalDetokenizer

REPLACEMENT = "\ufffd"


def chunks_of(ids, sizes):
    """`ids` in runs of these sizes, over and over."""
    start = index = 0
    while start < len(ids):
        size = sizes[index % len(sizes)]
        yield ids[start : start + size]
        start, index = start + size, index + 1


def run(detokenizer, ids, sizes=(1,)):
    pieces = [detokenizer.push(chunk) for chunk in chunks_of(ids, sizes)]
    return [*pieces, detokenizer.finish()]


sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(text=texts, sizes=sizes, skip=st.booleans())
def test_pieces_join_to_the_whole(tokenizer, text, sizes, skip):
    ids = tokenizer.encode(text, parse_special_tokens=True)
    pieces = run(IncrementalDetokenizer(tokenizer, skip_special_tokens=skip), ids, sizes)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    assert pieces[-1].finished
    assert pieces[-1].num_tokens == len(ids)


@given(data=st.data())
@settings(max_examples=300)
def test_pieces_join_to_the_whole_for_any_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.info.vocab_size + 3), max_size=40))
    pieces = run(IncrementalDetokenizer(tokenizer), ids, data.draw(sizes))
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", [text for text in HARD_STRINGS if REPLACEMENT not in text])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level", "llama"])
def test_no_piece_holds_half_a_character(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    for piece in run(IncrementalDetokenizer(tokenizer), ids):
        assert REPLACEMENT not in piece.text


@given(
    text=texts, stop=st.lists(st.text("ea <|\n", min_size=1, max_size=4), min_size=1, max_size=3), sizes=sizes
)
def test_stop_strings(tokenizer, text, stop, sizes):
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    ends = [whole.index(word) + len(word) for word in stop if word in whole]
    plain = run(IncrementalDetokenizer(tokenizer, stop=stop), ids, sizes)
    including = run(IncrementalDetokenizer(tokenizer, stop=stop, include_stop=True), ids, sizes)
    if not ends:
        assert "".join(piece.text for piece in plain) == whole
        assert plain[-1].matched_stop is None
        return
    matched = plain[-1].matched_stop
    assert "".join(piece.text for piece in including) == whole[: min(ends)]
    assert "".join(piece.text for piece in plain) == whole[: min(ends) - len(matched)]
    assert plain[-1].num_tokens == including[-1].num_tokens


@given(text=texts, sizes=sizes)
def test_num_tokens_counts_the_ids_whose_text_is_out(tokenizer, text, sizes):
    ids = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["e f", "\u4e16\u754c!"])
    out = ""
    for chunk in chunks_of(ids, sizes):
        piece = detokenizer.push(chunk)
        out += piece.text
        if piece.finished:
            break
        whole = tokenizer.decode(ids[: piece.num_tokens])
        assert out.startswith(whole.rstrip(REPLACEMENT)) or out == whole


def test_a_stop_string_ends_where_its_last_token_ends(tokenizers):
    tokenizer = tokenizers["byte_level"]
    head, tail = (tokenizer.encode(text) for text in ("The quick", " brown fox"))
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["ck br"])
    piece = detokenizer.push([*head, *tail])
    assert (piece.text, piece.matched_stop, piece.finished) == ("The qui", "ck br", True)
    assert len(head) < piece.num_tokens <= len(head) + len(tail)
    assert tokenizer.decode([*head, *tail][: piece.num_tokens]).startswith("The quick br")
    assert tokenizer.decode([*head, *tail][: piece.num_tokens - 1]) < "The quick br"
    again = detokenizer.push(tail)
    assert (again.text, again.num_tokens, again.finished) == ("", piece.num_tokens, True)
    assert detokenizer.finish() == again


def test_the_end_shows_what_was_held_back(tokenizers):
    tokenizer = tokenizers["llama"]
    ids = tokenizer.encode("\U0001f9ff", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(ids[:-1]).text == ""
    last = detokenizer.finish()
    assert (last.text, last.num_tokens, last.finished) == (REPLACEMENT, len(ids) - 1, True)


@given(text=texts, data=st.data())
def test_a_completion_joins_on_to_its_prompt(tokenizer, text, data):
    ids = tokenizer.encode(text, add_special_tokens=False)
    cut = data.draw(st.integers(0, len(ids)))
    prompt, completion = ids[:cut], ids[cut:]
    pieces = run(IncrementalDetokenizer(tokenizer, prefix_token_ids=prompt), completion)
    joined = tokenizer.decode(prompt).rstrip(REPLACEMENT) + "".join(piece.text for piece in pieces)
    assert joined.replace(REPLACEMENT, "") == tokenizer.decode(ids).replace(REPLACEMENT, "")


def test_a_run_of_text_after_a_control_token_has_no_space_before_it(tokenizers):
    tokenizer = tokenizers["sentencepiece"]
    prompt = tokenizer.encode("Hi<|end_of_sentence|>", parse_special_tokens=True)
    completion = tokenizer.encode("Hello", add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer, prefix_token_ids=prompt)
    assert detokenizer.push(completion).text == "Hello"


def test_time_a_token_does_not_grow(tokenizers):
    tokenizer = tokenizers["llama"]
    byte = tokenizer.encode("\U0001f9ff", add_special_tokens=False)[-1]
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["never", REPLACEMENT * 1000 + "x"])
    for _ in range(100):
        detokenizer.push([byte] * 1000)
    assert detokenizer.finish().num_tokens == 100_000

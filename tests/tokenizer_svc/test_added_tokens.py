import re

from hypothesis import given
from hypothesis import strategies as st

from tokenizer_svc.added_tokens import AddedToken, AddedTokens, compile_any, join_text

words = st.sets(st.text("ab<|", min_size=1, max_size=5), max_size=8)


@given(words=words, text=st.text("ab<|x", max_size=40))
def test_the_trie_matches_what_an_alternation_matches(words, text):
    plain = re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))) or "(?!)")
    spans = [match.span() for match in compile_any(words).finditer(text)]
    assert spans == [match.span() for match in plain.finditer(text)]


@given(words=words, text=st.text("ab<|x", max_size=40))
def test_segments_join_to_the_text(words, text):
    tokens = AddedTokens(
        tuple(AddedToken(n, word, is_special=bool(n % 2)) for n, word in enumerate(sorted(words)))
    )
    content = {token.id: token.content for token in tokens.tokens}
    for parse_special in (True, False):
        segments = tokens.split(text, parse_special=parse_special)
        assert "".join(content.get(segment, segment) for segment in segments) == text
        ids = {segment for segment in segments if isinstance(segment, int)}
        assert parse_special or ids.isdisjoint(tokens.special_ids)


def test_flags():
    tokens = AddedTokens(
        (
            AddedToken(1, "<l>", is_special=False, lstrip=True),
            AddedToken(2, "<r>", is_special=False, rstrip=True),
            AddedToken(3, "word", is_special=False, single_word=True),
        )
    )
    assert tokens.split("a  <l>  b", parse_special=True) == ["a", 1, "  b"]
    assert tokens.split("a  <r>  b", parse_special=True) == ["a  ", 2, "b"]
    assert tokens.split("sword word words", parse_special=True) == ["sword ", 3, " words"]
    assert tokens.split("  <l>", parse_special=True) == [1]


def test_neighbouring_texts_are_joined():
    assert list(join_text(["a", "b", 1, "", 2, "c", ""])) == ["ab", 1, 2, "c"]


def test_many_tokens_with_one_beginning_are_found_in_linear_time():
    pattern = compile_any(f"<|reserved_special_token_{n}|>" for n in range(2000))
    text = "<|reserved_special_token_" * 20_000 + "1999|>"
    assert [match[0] for match in pattern.finditer(text)] == ["<|reserved_special_token_1999|>"]

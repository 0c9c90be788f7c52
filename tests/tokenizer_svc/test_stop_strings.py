from hypothesis import given
from hypothesis import strategies as st

from tokenizer_svc.stop_strings import StopStrings

stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4)
pieces = st.lists(st.text("abc", max_size=5), max_size=10)


def first_match(text, stop):
    """The match that ends first, the longest of those; by looking at every prefix."""
    for end in range(1, len(text) + 1):
        if found := [word for word in stop if text[:end].endswith(word)]:
            return max(found, key=len), end
    return None, len(text)


@given(stop=stops, pieces=pieces)
def test_the_first_match_is_found_whatever_the_pieces(stop, pieces):
    matcher = StopStrings(stop)
    released = ""
    matched = None
    for piece in pieces:
        text, matched = matcher.push(piece)
        released += text
        if matched:
            break
    expected, end = first_match("".join(pieces), stop)
    assert matched == expected
    if matched:
        assert released == "".join(pieces)[: end - len(matched)]
    else:
        assert released + matcher.finish() == "".join(pieces)


@given(stop=stops, pieces=pieces)
def test_no_more_is_held_back_than_may_become_a_match(stop, pieces):
    matcher = StopStrings(stop)
    released = seen = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        if matched:
            return
        released, seen = released + text, seen + piece
        held = seen[len(released) :]
        assert not held or any(word.startswith(held) for word in stop)


def test_without_stop_strings_nothing_is_held():
    matcher = StopStrings([])
    assert matcher.push("anything") == ("anything", None)
    assert matcher.finish() == ""


def test_a_long_run_of_near_matches_takes_linear_time():
    matcher = StopStrings(["a" * 1000 + "b"])
    released, matched = matcher.push("a" * 300_000)
    assert matched is None
    assert len(released) == 299_000

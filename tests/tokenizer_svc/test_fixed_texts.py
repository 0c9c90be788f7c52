"""A client that prints fixed texts itself, as the gateway does, prints what the service would."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.detokenize import DetokenizeSession
from protos.wint2.tokenizer.v1 import tokenizer_pb2 as pb
from tests.tokenizer_svc.folders import texts
from tokenizer_svc.detokenizer import IncrementalDetokenizer
from tokenizer_svc.sessions import DetokenizeSessions
from tokenizer_svc.settings import RequestLimits
from tokenizer_svc.vocabulary import TextJoiner

LIMITS = RequestLimits()


class Wire:
    """The gateway's stream without sockets: chunks gather until `exchange`, which sends them and answers."""

    def __init__(self, tokenizer):
        self.generation = 0
        self.texts = tokenizer.vocabulary.fixed_texts()
        self.service = DetokenizeSessions(tokenizer, LIMITS)
        self.waiting = deque()
        self.num_sent = 0

    def chunk(self, session):
        self.waiting.append((session, pb.DetokenizeChunk(session_id=session.session_id)))
        return self.waiting[-1][1]

    def exchange(self):
        while self.waiting:
            session, chunk = self.waiting.popleft()
            session.on_sent()
            self.num_sent += len(chunk.token_ids)
            session.on_piece(self.service.push(chunk))


class Printed:
    """What a session said, put together."""

    def __init__(self):
        self.text, self.last = "", pb.DetokenizePiece()

    def on_piece(self, piece):
        assert not self.last.finished
        self.text += piece.text
        self.last = piece

    def on_lost(self, error):
        raise error


def printed_by_client(wire, ids, patience, **options):
    """`patience`: after how many tokens, over and over, the service's answers arrive."""
    printed = Printed()
    session = DetokenizeSession(wire, 1, pb.DetokenizeOptions(**options), printed)
    session.push(())
    for number, token_id in enumerate(ids):
        if number % patience == 0:
            wire.exchange()
        if not printed.last.finished:
            session.push([token_id])
    wire.exchange()
    if not printed.last.finished:
        session.push((), end=True)
    wire.exchange()
    return printed


def printed_by_service(tokenizer, ids, **options):
    detokenizer = IncrementalDetokenizer(tokenizer, **options)
    pushed = detokenizer.push(ids)
    last = detokenizer.finish()
    return pushed.text + last.text, last.matched_stop or "", last.num_tokens


stops = st.lists(st.text("ea <|\n世", min_size=1, max_size=4), max_size=2)


@given(text=texts, stop=stops, cut=st.integers(0, 12), skip=st.booleans(), patience=st.integers(1, 4))
def test_any_text(tokenizer, text, stop, cut, skip, patience):
    ids = tokenizer.encode(text, parse_special_tokens=True)
    options = {"stop": stop, "skip_special_tokens": skip, "prefix_token_ids": ids[:cut]}
    printed = printed_by_client(Wire(tokenizer), ids[cut:], patience, **options)
    told = printed.text, printed.last.matched_stop, printed.last.num_tokens
    assert told == printed_by_service(tokenizer, ids[cut:], **options)


@given(data=st.data())
@settings(max_examples=200)
def test_any_ids(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.info.vocab_size + 3), max_size=40))
    printed = printed_by_client(Wire(tokenizer), ids, data.draw(st.integers(1, 4)))
    told = printed.text, printed.last.matched_stop, printed.last.num_tokens
    assert told == printed_by_service(tokenizer, ids)


def test_most_of_a_text_stays_with_the_client(tokenizer):
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. It was the best of times.")
    wire = Wire(tokenizer)
    assert printed_by_client(wire, ids, 1).text == tokenizer.decode(ids)
    assert wire.num_sent <= 4 < len(ids) / 3


def test_a_fixed_text_is_what_a_settled_joiner_prints(tokenizer):
    for token_id, text in enumerate(tokenizer.vocabulary.fixed_texts()):
        joiner = TextJoiner(tokenizer.vocabulary, skip_special_tokens=False)
        joiner.push(tokenizer.encode("a", add_special_tokens=False)[-1])
        if text and joiner.is_settled:
            assert (joiner.push(token_id), joiner.is_settled) == (text, True)


@pytest.mark.parametrize("kind", ["sentencepiece"])
def test_a_run_of_text_after_a_control_token_begins_unsettled(tokenizers, kind):
    tokenizer = tokenizers[kind]
    [control] = tokenizer.encode("<|end_of_sentence|>", add_special_tokens=False, parse_special_tokens=True)
    detokenizer = IncrementalDetokenizer(tokenizer, prefix_token_ids=[control])
    assert not detokenizer.push(()).settled
    assert detokenizer.push(tokenizer.encode("Hi", add_special_tokens=False)).settled

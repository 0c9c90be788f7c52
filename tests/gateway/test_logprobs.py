"""Log-probabilities that JSON can carry."""

from __future__ import annotations

import json

from gateway.logprobs import logprob_entry, position_table, text_logprobs
from protos.wint2.common.v1.common_pb2 import PositionLogprobs, TokenLogprob

NEVER = PositionLogprobs(
    sampled=TokenLogprob(token_id=1, logprob=-float("inf")), top=[TokenLogprob(token_id=2, logprob=0.0)]
)
TEXTS = {1: "a", 2: "\N{REPLACEMENT CHARACTER}"}


def test_what_cannot_come_is_told_in_json() -> None:
    bodies = (logprob_entry(NEVER, TEXTS), text_logprobs([NEVER], TEXTS, 0)[0], position_table(NEVER, TEXTS))
    for body in bodies:
        assert "-9999.0" in json.dumps(body, allow_nan=False)


def test_half_a_character_has_no_bytes_of_its_own() -> None:
    entry = logprob_entry(NEVER, TEXTS)
    assert entry["bytes"] == [ord("a")]
    assert entry["top_logprobs"][0]["bytes"] is None

"""An error survives the way to google.rpc.Status and back."""

from __future__ import annotations

import pytest

from protos.rpc import errors


@pytest.mark.parametrize(
    "kind", [*errors.BY_CODE.values(), errors.ContextLengthError], ids=lambda k: k.__name__
)
def test_every_kind_survives_the_wire(kind):
    error = kind("no", field="a.b", metadata={"limit": "5"}, retry_after_seconds=1.5)
    back = errors.from_status(error.to_status())
    assert type(back) is kind
    assert (back.message, back.field, back.reason, back.metadata, back.retry_after_seconds) == (
        "no",
        "a.b",
        kind.default_reason,
        {"limit": "5"},
        1.5,
    )


def test_absent_details_stay_absent():
    back = errors.from_status(errors.NotFoundError("no such model").to_status())
    assert back.field is None
    assert back.retry_after_seconds is None


def test_a_message_never_carries_megabytes_back():
    assert len(errors.InvalidArgumentError("x" * 10_000_000).to_status().message) < 2100

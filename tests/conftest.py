"""What every test runs under: one thread of arithmetic, no network, no user configuration."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No WINT2_* variable of the developer's, and no model hub: what a test needs it sets itself."""
    for name in [name for name in os.environ if name.startswith("WINT2_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

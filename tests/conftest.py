"""What every test runs under: numbers drawn alike in every run, no network, no user configuration."""

from __future__ import annotations

import os
import random
import sys
from zlib import crc32

import pytest


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No WINT2_* variable of the developer's, and no model hub: what a test needs it sets itself."""
    for name in [name for name in os.environ if name.startswith("WINT2_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws depends on its name alone: who fails, fails again."""
    seed = crc32(item.nodeid.encode())
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)

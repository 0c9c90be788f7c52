"""The pictures of the docs can be drawn from the figures beside them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tests.bench.plots import DOCS, draw_all, idle

RESULTS = DOCS / "results"


def test_every_picture_is_drawn_from_the_results(tmp_path: Path) -> None:
    draw_all(RESULTS, tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in (DOCS / "img").glob("*.svg")}
    for path in tmp_path.iterdir():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert "prefers-color-scheme: dark" in path.read_text()


def test_results_say_where_they_come_from() -> None:
    for path in RESULTS.glob("*.json"):
        text = path.read_text()
        assert all(f'"{name}"' in text for name in ("device", "driver", "date", "command")), path.name


def test_idle_is_when_no_kernel_runs() -> None:
    assert idle([("a", 0.0, 2.0), ("b", 1.0, 1.5), ("c", 3.0, 4.0)]) == [(2.0, 3.0)]

"""Progress bars with the time that is left, for everything here that takes long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

OnProgress = Callable[[str, int, int], None]  # what is being done, done, total

_COLUMNS = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn())


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """A function that shows how far something is; a new name begins a new bar. On standard error."""
    bars = Progress(
        *_COLUMNS, TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what)
        bars.update(tasks[what], completed=done, total=total)

    with bars:
        yield show

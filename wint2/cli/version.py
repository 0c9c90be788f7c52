"""`wint2 version`: this package and what it stands on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from wint2.cli.run_typer import run_typer

PACKAGES = (
    "wint2",
    "torch",
    "cupy-cuda13x",
    "cupy-cuda12x",
    "grpcio",
    "protobuf",
    "tokenizers",
    "sentencepiece",
)


def show_version() -> None:
    """Print the versions of this package and what it stands on."""
    print(f"{'python':<14} {platform.python_version()}")
    for name in PACKAGES:
        print(f"{name:<14} {find_version(name)}")


def find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(arguments: list[str]) -> None:
    run_typer(show_version, arguments)

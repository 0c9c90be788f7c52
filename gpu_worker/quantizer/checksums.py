"""SHA256SUMS beside a checkpoint's shards, in the format that `sha256sum -c` reads."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

NAME = "SHA256SUMS"


def write(directory: Path, files: Sequence[Path]) -> None:
    """Sum `files` of `directory`."""
    partial = directory / f"{NAME}.partial"
    partial.write_text("".join(f"{_digest(path)}  {path.name}\n" for path in files), encoding="utf-8")
    partial.rename(directory / NAME)


def read(directory: Path) -> dict[str, str]:
    """File name -> digest; empty when there are no sums."""
    path = directory / NAME
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def verify(directory: Path, on_file: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """What differs from the sums, a line each."""
    problems, sums = [], read(directory)
    for done, (name, digest) in enumerate(sums.items()):
        on_file(done, len(sums))
        if not (directory / name).exists():
            problems.append(f"{name}: missing")
        elif _digest(directory / name) != digest:
            problems.append(f"{name}: does not match its sum")
    on_file(len(sums), len(sums))
    unsummed = {path.name for path in directory.glob("*.safetensors")} - set(sums)
    return problems + [f"{name}: has no sum" for name in sorted(unsummed)]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

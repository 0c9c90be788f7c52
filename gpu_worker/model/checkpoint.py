"""A checkpoint folder: which safetensors files it has, and every tensor in them by name.

model.safetensors                                      one file
model.safetensors.index.json + model-*.safetensors     shards
rank0/, rank1/, ...  each with one of the above        a tensor-parallel checkpoint of Paddle's
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpu_worker.model.errors import CheckpointError
from gpu_worker.model.safetensors_file import (
    MAX_HEADER_BYTES,
    HeaderError,
    SafetensorsFile,
    StoredTensor,
    Transfer,
    keep,
)

INDEX_NAME = "model.safetensors.index.json"
_PLAIN_NAME = re.compile(r"[^/\\\0\ud800-\udfff]+\.safetensors")
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".pdparams", ".npz", ".h5", ".msgpack")
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of every rank; a checkpoint that is not cut for tensor parallelism has one rank."""

    path: Path
    ranks: tuple[Tensors, ...]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensors in self.ranks for tensor in tensors.values())


def open_checkpoint(path: Path, transfer: Transfer = keep) -> Checkpoint:
    """Map every weight file of a folder, to be read through `transfer`.

    Raises CheckpointError with all that is wrong with the headers.
    """
    problems: list[str] = []
    if not path.is_dir():
        raise CheckpointError([f"{path}: no such folder"])
    ranks = tuple(_open_folder(folder, transfer, problems) for folder in _rank_folders(path))
    if problems:
        raise CheckpointError(problems)
    return Checkpoint(path, ranks)


def _rank_folders(path: Path) -> list[Path]:
    if not (path / "rank0").is_dir():
        return [path]
    count = sum(1 for folder in path.glob("rank*") if folder.name[4:].isdigit() and folder.is_dir())
    return [path / f"rank{rank}" for rank in range(count)]


def _open_folder(folder: Path, transfer: Transfer, problems: list[str]) -> Tensors:
    tensors: dict[str, StoredTensor] = {}
    for name in _file_names(folder, problems):
        for tensor in _open_file(folder / name, transfer, problems):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.path.name
                problems.append(f"tensor {tensor.name!r} is in {other} and in {name}")
            tensors[tensor.name] = tensor
    return tensors


def _open_file(path: Path, transfer: Transfer, problems: list[str]) -> Iterator[StoredTensor]:
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise HeaderError([f"{path}: not a file"])
        yield from SafetensorsFile(path, transfer).tensors.values()
    except HeaderError as error:
        problems += error.problems
    except OSError as error:
        problems.append(f"{path}: {error.strerror}")


def _file_names(folder: Path, problems: list[str]) -> list[str]:
    if (folder / INDEX_NAME).exists():
        return _indexed_names(folder / INDEX_NAME, problems)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        problems.append(f"{folder}: no *.safetensors file in it{_others(folder)}")
    return names


def _others(folder: Path) -> str:
    """Weights of other kinds, which are never read: a pickle may run code."""
    found = sorted(file.name for file in folder.glob("*") if file.suffix in _OTHER_WEIGHTS)
    return f"; {found[0]} is not read, convert it to safetensors first" if found else ""


def _indexed_names(index: Path, problems: list[str]) -> list[str]:
    """The shards that the index lists; a name may not lead out of the folder."""
    try:
        weight_map = json.loads(_read_bounded(index))["weight_map"]
        names = set(map(_text, weight_map.values()))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        problems.append(f'{index}: no valid index, expected {{"weight_map": {{tensor: file}}}}')
        return []
    found = {name: _name_problem(index.parent, name) for name in sorted(names)}
    problems += [f"{index}: file {name[:200]!r} {problem}" for name, problem in found.items() if problem]
    return [name for name, problem in found.items() if problem is None]


def _read_bounded(index: Path) -> bytes:
    if not index.is_file():
        raise ValueError("not a file")
    with index.open("rb") as file:
        content = file.read(MAX_HEADER_BYTES + 1)
    if len(content) > MAX_HEADER_BYTES:
        raise ValueError(f"more than {MAX_HEADER_BYTES} bytes")
    return content


def _name_problem(folder: Path, name: str) -> str | None:
    """Why an index may not name this file, or None. Links may lead where Hugging Face's cache keeps files:

    models--a--b/snapshots/0123abc/model.safetensors -> ../../blobs/4567def
    """
    if _PLAIN_NAME.fullmatch(name) is None:
        return "is not a plain name in this folder"
    folder = folder.resolve()
    home = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    target = (folder / name).resolve()
    if target.is_relative_to(folder) or target.is_relative_to(home):
        return None
    return f"is a link to {target}, outside this folder"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value

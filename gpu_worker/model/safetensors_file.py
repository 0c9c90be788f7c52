"""One safetensors file: its header checked before anything is believed, its tensors mapped, not copied.

u64 little-endian n | n bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}} | tensor data
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

# All tensors of the 300B checkpoint take 6 MB of header; JSON of this size may take 20 times as much memory.
MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSIONS = 8
_LFS_POINTER = b"version "  # as which such a file begins; as a length it would be 2 exabytes

# U16 is how Paddle's writers label bfloat16, having no numpy dtype for it.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.bfloat16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "I64": torch.int64,
    "F64": torch.float64,
}


Transfer = Callable[[torch.Tensor], torch.Tensor]


def keep(tensor: torch.Tensor) -> torch.Tensor:
    """The transfer of a model that computes on the CPU: none."""
    return tensor


class HeaderError(ValueError):
    """A file that is no safetensors file, or a damaged one; `problems` holds all that was found."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class TensorFile(Protocol):
    """What holds tensors: a mapped file, or something that makes them up."""

    path: Path

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor, on the CPU over the file's own pages or wherever the file brings it."""

    def release(self, tensor: StoredTensor) -> None:
        """Let the tensor's pages go, so that a process's size does not grow to its checkpoint's."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: where, and as what."""

    name: str
    file: TensorFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The tensor; over the file's own pages where it stays on the CPU."""
        return self.file.read(self)

    def release(self) -> None:
        """To be called when what was read is no longer needed, or was copied."""
        self.file.release(self)


class SafetensorsFile:
    """A mapped file and its checked tensors. Raises HeaderError; OSError if it cannot be opened.

    Tensors are read through `transfer`, which may bring them to a device.
    """

    def __init__(self, path: Path, transfer: Transfer = keep) -> None:
        self.path = path
        self._transfer = transfer
        with path.open("rb") as file:
            size = path.stat().st_size
            header_bytes = _read_header(path.name, file.read(8), size)
            header = _parse_header(path.name, file.read(header_bytes))
            # Copy-on-write: torch wants writable memory, and the file stays as it is.
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.tensors = self._check(header, data_begin=8 + header_bytes, size=size)

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """The tensor over the file's own pages, transferred; writing to it would not reach the file."""
        if not tensor.nbytes:
            return self._transfer(torch.empty(tensor.shape, dtype=tensor.dtype))
        count = math.prod(tensor.shape)
        flat = torch.frombuffer(self.memory, dtype=tensor.dtype, count=count, offset=tensor.begin)
        return self._transfer(flat.view(tensor.shape))

    def release(self, tensor: StoredTensor) -> None:
        begin = tensor.begin - tensor.begin % mmap.PAGESIZE
        self.memory.madvise(mmap.MADV_DONTNEED, begin, tensor.begin + tensor.nbytes - begin)

    def _check(self, header: dict[str, Any], data_begin: int, size: int) -> dict[str, StoredTensor]:
        problems: list[str] = []
        spans: list[tuple[int, int, str]] = []
        tensors: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            problem = _entry_problem(entry)
            if problem:
                problems.append(f"{self.path.name}: tensor {name[:200]!r} {problem}")
                continue
            begin, end = entry["data_offsets"]
            spans.append((begin, end, name))
            if data_begin + end > size:
                continue
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            tensors[name] = StoredTensor(name, self, dtype, shape, data_begin + begin)
        problems += [f"{self.path.name}: {problem}" for problem in _overlaps(spans)]
        problems += [f"{self.path.name}: {problem}" for problem in _truncation(spans, size - data_begin)]
        if problems:
            raise HeaderError(problems)
        return tensors


def _read_header(name: str, prefix: bytes, size: int) -> int:
    """The header's length, checked against the file's."""
    if prefix == _LFS_POINTER:
        raise HeaderError([f"{name}: a Git LFS pointer, not the file itself: run `git lfs pull`"])
    length = int.from_bytes(prefix, "little")
    if size < 8:
        raise HeaderError([f"{name}: {size} bytes are too few for a safetensors file"])
    if length > MAX_HEADER_BYTES:
        raise HeaderError([f"{name}: header of {length} bytes, at most {MAX_HEADER_BYTES} are allowed"])
    if length > size - 8:
        raise HeaderError([f"{name}: header of {length} bytes in a file of {size}: truncated?"])
    return length


def _parse_header(name: str, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise HeaderError([f"{name}: the header is not valid JSON ({error})"]) from error
    if not isinstance(header, dict):
        raise HeaderError([f"{name}: the header is not a JSON object"])
    header.pop("__metadata__", None)
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a key occurs twice")
    return entries


def _entry_problem(entry: Any) -> str | None:
    """Why a tensor's header entry cannot be believed, or None."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "lacks dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"has dtype {str(dtype)[:40]!r}, which no tensor of these models has"
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        return "has a shape that is no list of up to eight sizes"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "has data_offsets that are no [begin, end]"
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        return f"of {dtype} {shape} needs {expected} bytes, its data_offsets span {offsets[1] - offsets[0]}"
    return None


def _are_sizes(values: Any) -> bool:
    """A list of sizes below 2^63; `bool` is an int to Python, not to us."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _truncation(spans: list[tuple[int, int, str]], data_bytes: int) -> Iterable[str]:
    """One line, however many tensors are cut off."""
    beyond = [name for _, end, name in spans if end > data_bytes]
    if beyond:
        needed = max(end for _, end, _ in spans)
        yield (
            f"the file is truncated: it has {data_bytes} bytes of tensors, its header tells of {needed}; "
            f"{len(beyond)} of {len(spans)} tensors are not whole, {beyond[0][:200]!r} among them"
        )


def _overlaps(spans: list[tuple[int, int, str]]) -> Iterable[str]:
    ordered = sorted(span for span in spans if span[0] < span[1])
    for (_, end, first), (begin, _, second) in itertools.pairwise(ordered):
        if begin < end:
            yield f"tensors {first[:200]!r} and {second[:200]!r} overlap"

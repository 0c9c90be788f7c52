"""csrc/X.cu to cubins through NVRTC: one set of options for CI and device, a cache on disk, a warm-up.

NVRTC needs neither a GPU nor a driver. Kernels include no CUDA header, so the toolkit's own include
folders, and the differences between the pip wheels of CUDA 12 and 13, do not matter.
"""

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

SOURCES = Path(__file__).parent / "csrc"
CACHE = Path.home() / ".cache" / "wint2" / "kernels"


class KernelBuildError(RuntimeError):
    """NVRTC is missing, or refused a source; the message shows the source line."""


@dataclass(frozen=True)
class Variant:
    """One source with one set of macros: one cubin."""

    stem: str
    defines: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return self.stem + "".join(f" {name}={value}" for name, value in self.defines)


@dataclass(frozen=True)
class Cubin:
    """Machine code, and what the assembler said about each kernel."""

    code: bytes
    log: str
    usage: Mapping[str, "Usage"] = field(repr=False)


@dataclass(frozen=True)
class Usage:
    """What one kernel takes: registers a thread, spilled bytes, static shared memory bytes."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def options(variant: Variant, arch: str) -> list[str]:
    """NVRTC's command line, for CI's compile test and for the device alike. `arch` as in "sm_90a"."""
    return [
        f"--gpu-architecture={arch}",
        "--std=c++17",
        "--ptxas-options=-v",
        "--ptxas-options=--warn-on-spills",
        "--ptxas-options=--warn-on-local-memory-usage",
        f"--include-path={SOURCES}",
        *(f"-D{name}={value}" for name, value in variant.defines),
    ]


def device_arch(capability: tuple[int, int]) -> str:
    """The target to build for; from 9.0 on the architecture-specific one, which has wgmma."""
    major, minor = capability
    if major < 8:
        raise KernelBuildError(f"compute capability {major}.{minor}: the kernels need 8.0 or newer")
    return f"sm_{major}{minor}" + ("a" if major >= 9 else "")


def load_or_build(variant: Variant, arch: str, directory: Path = CACHE) -> Path:
    """The cubin's path, built on first use; processes that want the same one wait for one another."""
    path = directory / f"{variant.stem}-{arch}-{_digest(variant, arch)}.cubin"
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _write_atomically(path, compile_cubin(variant, arch).code)
    return path


def warm_up(
    variants: Iterable[Variant], arch: str, progress: Callable[[int, int, Variant], None] | None = None
) -> None:
    """Builds every variant that the cache lacks, in parallel; `progress(done, total, variant)` after each."""
    wanted = list(dict.fromkeys(variants))
    with ThreadPoolExecutor() as pool:
        running = {pool.submit(load_or_build, variant, arch): variant for variant in wanted}
        for done, future in enumerate(as_completed(running), start=1):
            future.result()
            if progress:
                progress(done, len(wanted), running[future])


def compile_cubin(variant: Variant, arch: str, folder: Path | None = None) -> Cubin:
    """Compiles one variant to machine code; raises KernelBuildError with the offending source line."""
    nvrtc = _nvrtc()
    source = ((folder or SOURCES) / f"{variant.stem}.cu").read_bytes()
    arguments = [option.encode() for option in options(variant, arch)]
    error, program = nvrtc.nvrtcCreateProgram(source, f"{variant.stem}.cu".encode(), 0, [], [])
    _expect_success(error)
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(arguments), arguments)
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode().rstrip("\0 \n")
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelBuildError(f"{variant} for {arch} does not compile:\n{_with_source_lines(log)}")
        return Cubin(_read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log, _usage(log))
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _digest(variant: Variant, arch: str) -> str:
    parts = [*options(variant, arch), str(_nvrtc_version())]
    files = [SOURCES / f"{variant.stem}.cu", *sorted(SOURCES.glob("*.cuh"))]
    content = b"\0".join(path.read_bytes() for path in files)
    return hashlib.sha256(content + "\0".join(parts).encode()).hexdigest()[:16]


def _write_atomically(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    Path(file.name).replace(path)


@cache
def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise KernelBuildError(
            "the CUDA compiler is missing: pip install 'wint2[cuda13]' (or cuda12 for drivers before 580); "
            f"without it run on the CPU ({error})"
        ) from error
    return nvrtc


def _nvrtc_version() -> tuple[int, int]:
    error, major, minor = _nvrtc().nvrtcVersion()
    _expect_success(error)
    return major, minor


def _read(get_size: Callable[..., Any], get: Callable[..., Any], program: object) -> bytes:
    error, size = get_size(program)
    _expect_success(error)
    buffer = b" " * int(size)
    _expect_success(*get(program, buffer))
    return buffer


def _expect_success(error: Any) -> None:
    if int(error) != 0:
        raise KernelBuildError(f"NVRTC: {error}")


def _with_source_lines(log: str) -> str:
    """NVRTC's log with the source line under each message of the form file(line): ..."""
    shown = []
    for line in log.splitlines():
        shown.append(line)
        if place := re.match(r"(\S+\.cuh?)\((\d+)\): (?:error|warning)", line):
            file, number = SOURCES / Path(place[1]).name, int(place[2])
            shown.append(f"    {number} | {file.read_text().splitlines()[number - 1].strip()}")
    return "\n".join(shown)


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def _usage(log: str) -> dict[str, Usage]:
    return {
        entry["name"]: Usage(
            registers=int(entry["registers"]),
            spill_bytes=int(entry["stores"]) + int(entry["loads"]),
            stack_bytes=int(entry["stack"]),
            shared_bytes=int(shared[1]) if (shared := re.search(r"(\d+) bytes smem", entry["rest"])) else 0,
        )
        for entry in _ENTRY.finditer(log)
    }

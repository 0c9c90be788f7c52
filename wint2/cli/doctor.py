"""`wint2 doctor`: looks at this machine, and at a checkpoint, and says what would go wrong."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from wint2.cli.run_typer import run_typer
from wint2.cli.version import find_version
from wint2.errors import EXIT_FAILED, CommandError
from wint2.preflight import check_model

GIB = 1 << 30
SERVICES = {
    "gateway": ("fastapi", "uvicorn"),
    "tokenizer_svc": ("sentencepiece", "tokenizers", "jinja2"),
    "gpu_worker": ("torch", "numpy", "safetensors"),
}
ConfigOption = Annotated[
    Path | None, typer.Option(help="directory with a config.json: what such a model takes, and where it fits")
]
CacheDtypeOption = Annotated[
    Literal["float32", "bfloat16", "int8", "fp8"], typer.Option(help="numbers of --config's KV cache")
]
SeqsOption = Annotated[int, typer.Option(min=1, help="most sequences in a step of --config's model")]
TokensOption = Annotated[int, typer.Option(min=1, help="most tokens in a step of --config's model")]
ModelOption = Annotated[Path | None, typer.Option(help="checkpoint to look at as well")]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    state: Literal["ok", "note", "FAIL"]
    subject: str
    text: str


def doctor(
    model: ModelOption = None,
    config: ConfigOption = None,
    kv_cache_dtype: CacheDtypeOption = "bfloat16",
    max_num_seqs: SeqsOption = 256,
    max_num_batched_tokens: TokensOption = 8192,
) -> None:
    """Look at this machine, and at a checkpoint, and say what would go wrong (exit code 1)."""
    if config is not None:
        # Imported when asked for: it needs torch, of which doctor may have to say that it is missing.
        show = importlib.import_module("wint2.cli.sizes").show
        show(config, kv_cache_dtype, max_num_seqs, max_num_batched_tokens)
        return
    findings = [*_machine(), *_packages(), *_gpu(), *(_model(model) if model is not None else ())]
    for finding in findings:
        print(f"{finding.state:<5} {finding.subject:<14} {finding.text}")
    failures = dict.fromkeys(finding.subject for finding in findings if finding.state == "FAIL")
    if failures:
        raise CommandError(f"not ready: {', '.join(failures)}", EXIT_FAILED)


def _machine() -> Iterator[Finding]:
    is_new = sys.version_info >= (3, 11)
    yield Finding(
        "ok" if is_new else "FAIL", "python", f"{platform.python_version()} (3.11 or newer is needed)"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield Finding(
        "ok", "machine", f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory"
    )


def _packages() -> Iterator[Finding]:
    for service, packages in SERVICES.items():
        missing = [name for name in packages if find_spec(name) is None]
        if missing:
            yield Finding("FAIL", service, f"not installed: {', '.join(missing)}")
        else:
            yield Finding("ok", service, ", ".join(f"{name} {find_version(name)}" for name in packages))
    is_built = find_spec("protos.wint2.worker.v1.worker_pb2") is not None
    yield Finding(
        "ok" if is_built else "FAIL", "stubs", "compiled" if is_built else "missing: run `make protos`"
    )


def _gpu() -> Iterator[Finding]:
    """A GPU is a note when there is none: the CPU serves too."""
    if find_spec("torch") is None:
        return
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        driver = "a driver is installed" if shutil.which("nvidia-smi") else "no NVIDIA driver"
        yield Finding(
            "note", "gpu", f"none that torch {torch.__version__} can use ({driver}): computing on the CPU"
        )
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        text = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, sm_{facts.major}{facts.minor}"
        yield Finding("ok", f"gpu {index}", text)
    yield _cupy(torch.version.cuda)


def _cupy(cuda: str) -> Finding:
    if find_spec("cupy") is None:
        extra = f"cuda{cuda.partition('.')[0]}"
        return Finding("FAIL", "cupy", f"not installed, the kernels need it: pip install 'wint2[{extra}]'")
    cupy = importlib.import_module("cupy")
    return Finding("ok", "cupy", f"{cupy.__version__}, torch's CUDA {cuda}")


def _model(path: Path) -> Iterator[Finding]:
    try:
        check_model(path)
        # Without torch its absence is told above, and the files can not be looked into.
        found = importlib.import_module("wint2.cli.sizes").look_into(path) if find_spec("torch") else []
    except CommandError as error:
        yield from (Finding("FAIL", "model", line) for line in str(error).splitlines())
        return
    yield from (Finding("note" if index else "ok", "model", line) for index, line in enumerate(found))


def main(arguments: list[str]) -> None:
    run_typer(doctor, arguments)

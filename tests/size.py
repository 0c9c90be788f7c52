"""How large the code is, by package: files, lines, functions. `make size` prints it; test_house caps it."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("protos", "gateway", "tokenizer_svc", "gpu_worker", "cuda_kernels", "wint2")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """A Python file of ours, read and parsed once."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def num_lines(self) -> int:
        return self.text.count("\n")

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        return (node for node in ast.walk(self.tree) if isinstance(node, FUNCTIONS))


@cache
def sources(package: str) -> tuple[Source, ...]:
    """The files of a package, generated stubs left out."""
    paths = (path for path in sorted((ROOT / package).rglob("*.py")) if "_pb2" not in path.name)
    return tuple(Source(path, text := path.read_text(), ast.parse(text)) for path in paths)


def num_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From the `def` to the last line."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def row(package: str) -> str:
    files = sources(package)
    lines = [num_lines(function) for file in files for function in file.functions()] or [0]
    percentile = sorted(lines)[int(0.95 * (len(lines) - 1))]
    return (
        f"{package:<14} {len(files):>5} {sum(file.num_lines for file in files):>7} {len(lines):>9}"
        f" {statistics.median(lines):>7.0f} {percentile:>5} {max(lines):>5}"
    )


if __name__ == "__main__":
    print(f"{'package':<14} {'files':>5} {'lines':>7} {'functions':>9} {'median':>7} {'p95':>5} {'max':>5}")
    for package in (*PACKAGES, "tests"):
        print(row(package))
    kernels = [path.read_text().count("\n") for path in (ROOT / "cuda_kernels" / "csrc").glob("*.cu*")]
    print(f"{'csrc':<14} {len(kernels):>5} {sum(kernels):>7}")

"""The house rules that no linter knows: sizes, the one door to the environment, no leftovers."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.size import PACKAGES, ROOT, Source, num_lines, sources

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40
MAX_CUDA_LINES = 450
MEDIAN_FUNCTION_LINES = 7

OURS = [source for package in PACKAGES for source in sources(package)]
TESTS = list(sources("tests"))
KERNELS = sorted((ROOT / "cuda_kernels" / "csrc").glob("*.cu*"))
TEXT = {".py", ".proto", ".cu", ".cuh", ".md", ".toml", ".yml", ".yaml", ".sh", ".html", ".js", ".mjs"}
LEFTOVERS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
# Catching everything without raising it again is right where a process must go on whatever a request does.
BROAD_EXCEPT = {
    "protos/rpc/interceptor.py",  # becomes the call's status
    "gpu_worker/engine/loop.py",  # fails every waiter and turns health
    "gateway/edge.py",  # becomes HTTP 500 without internals
    "gateway/merge.py",  # travels through a queue to the reader, who raises it
}


def names(items: list[Source]) -> list[str]:
    return [item.name for item in items]


@pytest.mark.parametrize("source", [*OURS, *TESTS], ids=names([*OURS, *TESTS]))
def test_a_file_fits_in_the_head(source):
    assert source.num_lines <= MAX_FILE_LINES


@pytest.mark.parametrize("source", OURS, ids=names(OURS))
def test_a_function_fits_on_the_screen(source):
    too_long = {f.name: num_lines(f) for f in source.functions() if num_lines(f) > MAX_FUNCTION_LINES}
    assert not too_long


def test_most_functions_are_small():
    lines = sorted(num_lines(function) for source in OURS for function in source.functions())
    assert lines[len(lines) // 2] <= MEDIAN_FUNCTION_LINES


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_a_kernel_file_fits_in_the_head(path):
    assert path.read_text().count("\n") <= MAX_CUDA_LINES


@pytest.mark.parametrize("source", OURS, ids=names(OURS))
def test_a_module_says_what_it_is_for(source):
    if source.path.name != "__init__.py" or source.tree.body:
        assert ast.get_docstring(source.tree), "a module begins with one sentence"


@pytest.mark.parametrize("source", OURS, ids=names(OURS))
def test_the_environment_is_read_in_settings_only(source):
    if source.path.name != "settings.py":
        reads = [node.lineno for node in ast.walk(source.tree) if reads_environment(node)]
        assert not reads


def reads_environment(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv"}


@pytest.mark.parametrize("source", OURS, ids=names(OURS))
def test_all_names_exist(source):
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            exported = ast.literal_eval(node.value)
            assert len(exported) == len(set(exported))
            assert not [name for name in exported if not hasattr(import_module(module_name(source)), name)]


def module_name(source: Source) -> str:
    return source.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_everything_is_caught_in_few_places_only():
    found = {source.name for source in OURS for node in ast.walk(source.tree) if catches_everything(node)}
    assert found <= BROAD_EXCEPT


def catches_everything(node: ast.AST) -> bool:
    if not isinstance(node, ast.ExceptHandler):
        return False
    is_broad = node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"}
    return is_broad and not any(isinstance(inner, ast.Raise) for inner in ast.walk(node))


def committed_text() -> list[Path]:
    folders = [ROOT / name for name in (*PACKAGES, "tests", "docs", "deploy")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in TEXT]
    return [path for path in (*files, *ROOT.glob("*.*")) if path.is_file() and is_ours(path)]


def is_ours(path: Path) -> bool:
    return "_pb2" not in path.name and "node_modules" not in path.parts and path.suffix != ".log"


def test_nothing_is_left_for_later():
    texts = {str(path.relative_to(ROOT)): path.read_text(errors="replace") for path in committed_text()}
    assert not [name for name, text in texts.items() if LEFTOVERS.search(text)]

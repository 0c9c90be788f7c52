"""The contract of the wire passes `buf lint` with the rules of buf.yaml: STANDARD and COMMENTS."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.node_packages import install_packages, needs_npm

ROOT = Path(__file__).parents[2]

pytestmark = needs_npm


@pytest.fixture(scope="module")
def buf() -> Path:
    return install_packages() / "buf"


def lint(buf: Path, root: Path) -> subprocess.CompletedProcess:
    return subprocess.run([buf, "lint", root], capture_output=True, text=True, timeout=60, check=False)


def test_the_protos_are_clean(buf):
    done = lint(buf, ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_field_without_a_comment_is_found(buf, tmp_path):
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("*.py*", "rpc"))
    path = tmp_path / "protos" / "wint2" / "common" / "v1" / "common.proto"
    text = path.read_text()
    line = "  // Ids of the model's vocabulary, in order.\n"
    assert line in text
    path.write_text(text.replace(line, ""))
    done = lint(buf, tmp_path)
    assert done.returncode != 0
    assert 'Field "ids" should have a non-empty comment' in done.stdout

"""The contract of the wire only grows: `buf breaking` against the last release's.

A release renews it: buf build -o tests/vectors/protos.binpb --exclude-source-info
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.node_packages import install_packages, needs_npm

ROOT = Path(__file__).parents[2]
RELEASED = ROOT / "tests" / "vectors" / "protos.binpb"

pytestmark = needs_npm


@pytest.fixture(scope="module")
def buf() -> Path:
    return install_packages() / "buf"


def breaking(buf: Path, root: Path) -> subprocess.CompletedProcess:
    command = [buf, "breaking", root, "--against", RELEASED]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_released_clients_and_servers_still_understand_each_other(buf):
    done = breaking(buf, ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("line", "changed", "words"),
    [
        ("  repeated uint32 ids = 1;", "  repeated uint64 ids = 1;", 'changed type from "uint32"'),
        ("  optional float top_p = 2;", "", 'field "2" with name "top_p" on message "SamplingParams"'),
    ],
)
def test_a_changed_or_lost_field_is_found(buf, tmp_path, line, changed, words):
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    shutil.copytree(ROOT / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("*.py*", "rpc"))
    path = tmp_path / "protos" / "wint2" / "common" / "v1" / "common.proto"
    text = path.read_text()
    assert line in text
    path.write_text(text.replace(line, changed))
    done = breaking(buf, tmp_path)
    assert done.returncode != 0
    assert words in done.stdout

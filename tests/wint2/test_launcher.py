"""The launcher over real child processes: ready, ended by signals, by a child's death, by its own death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("fake_stack.py")
WAIT_SECONDS = 30.0


class RunningStack:
    """The launcher's process, its output in a file."""

    def __init__(self, folder: Path, *behaviours: str) -> None:
        self.folder = folder
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), str(folder), *behaviours], stdout=log, stderr=log
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def wait_ready(self) -> RunningStack:
        wait_for(lambda: "worker gRPC" in self.text or self.process.poll() is not None)
        assert self.process.poll() is None, self.text
        return self

    def end(self) -> int:
        return self.process.wait(timeout=WAIT_SECONDS)

    def children(self) -> list[int]:
        """Processes whose command line names this stack's folder, the launcher left out."""
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if f"unix:{self.folder}/" in _read(path)
        ]


def _read(path: Path) -> str:
    try:
        return path.read_text().replace("\0", " ")
    except OSError:
        return ""


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RunningStack]]:
    stacks: list[RunningStack] = []

    def start(*behaviours: str) -> RunningStack:
        stacks.append(RunningStack(tmp_path, *behaviours))
        return stacks[-1]

    yield start
    for stack in stacks:
        stack.process.kill()
        stack.process.wait()
        wait_for(lambda stack=stack: not stack.children())


def test_the_start_ends_with_what_was_found(start):
    stack = start().wait_ready()
    for line in (
        "  device        cpu, float32, tensor parallel 1",
        "  quantization  experts 0-1 wint2",
        "  KV cache      10 blocks x 64 = 640 tokens",
        "  HTTP          http://h:1/v1   (health http://h:1/health, metrics http://h:1/metrics)",
    ):
        assert line in stack.text
    assert len(stack.children()) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_all_the_gateway_first(start, number):
    stack = start("gateway=slow").wait_ready()
    stack.process.send_signal(number)
    assert stack.end() == 0
    assert stack.text.index("gateway.sock ended") < stack.text.index("worker.sock ended")
    assert not stack.children()


def test_a_second_signal_ends_at_once(start):
    stack = start("gateway=stubborn").wait_ready()
    stack.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "gateway.sock ended" in stack.text)
    begin = time.monotonic()
    stack.process.send_signal(signal.SIGTERM)
    stack.end()
    assert time.monotonic() - begin < 5
    assert not stack.children()


def test_a_signal_during_the_start_ends_all(start):
    stack = start("worker=never")
    wait_for(lambda: len(stack.children()) == 3)
    time.sleep(0.5)
    stack.process.send_signal(signal.SIGTERM)
    assert stack.end() == 0
    assert not stack.children()


def test_a_child_that_refuses_its_input_ends_the_stack_with_its_line(start):
    stack = start("worker=refuse")
    assert stack.end() == 2
    assert stack.text.splitlines()[-1] == "error: worker: --model: experts.3.up is 12 bytes short"
    assert not stack.children()


def test_a_child_that_dies_ends_the_stack_with_its_last_lines(start):
    stack = start("worker=crash")
    assert stack.end() == 1
    epitaph = stack.text.partition("error: worker ended with exit code 3; its last lines:\n")[2]
    assert epitaph.splitlines()[-2:] == ["  the device fell off the bus", "  NVRM: Xid 79"]
    assert not stack.children()


def test_a_killed_child_is_named_with_its_signal(start):
    stack = start().wait_ready()
    victim = next(pid for pid in stack.children() if "tokenizer.sock" in _read(Path(f"/proc/{pid}/cmdline")))
    os.kill(victim, signal.SIGKILL)
    assert stack.end() == 1
    assert "error: tokenizer was ended by SIGKILL" in stack.text
    assert not stack.children()


def test_no_child_outlives_a_killed_launcher(start):
    stack = start().wait_ready()
    stack.process.kill()
    stack.end()
    wait_for(lambda: not stack.children())

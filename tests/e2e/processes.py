"""Real processes of this project under a test: started, waited for, and surely ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

WAIT_SECONDS = 60.0
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def wait_for(is_so: Callable[[], object], what: str, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.05)


def plain_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WINT2_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


class Process:
    """A command whose output goes to a file."""

    def __init__(self, log: Path, *command: str | Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=plain_environment(),
                start_new_session=True,
            )

    @classmethod
    def module(cls, log: Path, name: str, *arguments: str | Path) -> Process:
        return cls(log, sys.executable, "-m", name, *arguments)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_line(self, part: str) -> Process:
        """Returns when `part` is in the output; fails with the output if the process ends first."""
        wait_for(lambda: part in self.text or self.process.poll() is not None, f"{part!r} in {self.log}")
        assert part in self.text, self.text
        return self

    def end(self) -> int:
        return self.process.wait(WAIT_SECONDS)

    def kill(self) -> None:
        """Ends the process and all it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(5.0)
                except subprocess.TimeoutExpired:
                    continue


def descendants(folder: Path) -> list[int]:
    """Processes that carry a folder's name in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in path.read_text():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found

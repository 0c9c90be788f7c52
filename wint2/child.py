"""One child process: it dies with its parent, its output is passed on, its last lines are kept."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable

from wint2.settings import child_environment
from wint2.stack import Service

TAIL_LINES = 100  # kept
EPITAPH_LINES = 12  # shown of a child that did not say why
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LINE_END = re.compile(rb"(?<=[\r\n])")


class Child:
    """A started service. `tail` holds its last lines of output."""

    def __init__(self, service: Service, process: asyncio.subprocess.Process) -> None:
        self.service = service
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process = process
        self._ended = asyncio.create_task(self._follow())

    @classmethod
    async def start(cls, service: Service) -> Child:
        """Starts the service in a process group of its own: the terminal's Ctrl-C does not reach it."""
        process = await asyncio.create_subprocess_exec(
            *service.command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=child_environment(service.environment),
            process_group=0,
            preexec_fn=_die_with(os.getpid()),
        )
        return cls(service, process)

    @property
    def has_ended(self) -> bool:
        return self._ended.done()

    @property
    def exit_code(self) -> int:
        return self._ended.result()

    async def wait(self) -> int:
        """The exit code, once the process is gone and its output passed on; minus a signal's number."""
        return await asyncio.shield(self._ended)

    def send(self, number: signal.Signals) -> None:
        """Signals the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def epitaph(self) -> str:
        """Why it ended: its own `error:` with the lines that follow it, or else its last lines."""
        errors = [index for index, line in enumerate(self.tail) if line.startswith("error: ")]
        if errors:
            reason = list(self.tail)[errors[-1] :]
            return f"{self.service.name}: {chr(10).join(reason).removeprefix('error: ')}"
        code = self.exit_code
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        lines = "".join(f"\n  {line}" for line in list(self.tail)[-EPITAPH_LINES:])
        return f"{self.service.name} {how}{'; its last lines:' if lines else ''}{lines}"

    async def _follow(self) -> int:
        output = asyncio.create_task(self._read_output())
        code = await self._process.wait()
        self.send(signal.SIGKILL)  # what it started and left behind, which may hold its output open
        await output
        return code

    async def _read_output(self) -> None:
        assert self._process.stdout is not None
        rest = b""
        while data := await self._process.stdout.read(1 << 16):
            *lines, rest = LINE_END.split(rest + data)
            for line in lines:
                self._pass_on(line)
        self._pass_on(rest)

    def _pass_on(self, line: bytes) -> None:
        """Whole lines only, so that the children's lines do not mix; a progress bar's `\\r` ends one too."""
        text = line.decode(errors="replace")
        sys.stderr.write(text)
        sys.stderr.flush()
        if text.strip():
            self.tail.append(text.rstrip())


def _die_with(parent: int) -> Callable[[], None] | None:
    """Runs in the child before its program: when the parent dies, however, the kernel ends the child."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return ask_kernel

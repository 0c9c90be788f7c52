"""Renders chat templates in processes of their own, so that no template can hang or bloat this one."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import weakref
from dataclasses import dataclass
from typing import Any

from tokenizer_svc.errors import InputError

FIELD = "chat_template"


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may cost."""

    max_template_chars: int = 1 << 20
    max_text_chars: int = 16 << 20
    cpu_seconds: float = 3.0
    num_processes: int = 2


class TemplateError(InputError):
    """A template that cannot be compiled or rendered; `line` is where."""

    def __init__(self, message: str, line: int | None = None) -> None:
        where = "" if line is None else f"line {line}: "
        super().__init__(FIELD, f"chat template: {where}{message}")
        self.line = line


class TemplatePool:
    """A few rendering processes, started when first needed. `render` may be called from any thread."""

    def __init__(self, limits: TemplateLimits) -> None:
        self.limits = limits
        # A token for every process that may exist: the process, or None where it has to be started.
        self._idle: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(limits.num_processes):
            self._idle.put(None)
        self.close = weakref.finalize(self, _end_all, self._idle)

    def render(self, template: str, context: dict[str, Any]) -> str:
        """The template's text. TemplateError if it fails or goes beyond a limit."""
        limits = self.limits
        if len(template) > limits.max_template_chars:
            raise TemplateError(
                f"it has {len(template)} characters, more than the limit of {limits.max_template_chars}"
            )
        request = {
            "template": template,
            "context": context,
            "max_chars": limits.max_text_chars,
            "cpu_seconds": limits.cpu_seconds,
        }
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError("messages", f"a conversation is made of JSON values: {error}") from error
        answer = self._exchange(line)
        if "text" not in answer:
            raise TemplateError(answer["message"], answer["line"])
        return str(answer["text"])

    def _exchange(self, request: bytes) -> dict[str, Any]:
        process = self._idle.get()
        try:
            process = process or _start()
            line = _ask(process, request)
        finally:
            self._idle.put(process if process and process.poll() is None else None)
        if not line:
            raise TemplateError(f"it ran for more than {self.limits.cpu_seconds:g} s, or out of memory")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _start() -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", f"{__package__}.template_process"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _ask(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """The answer's line; b"" if the process ended instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(request)
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = b""
    if not line:
        _end(process)
    return line


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def _end_all(idle: queue.LifoQueue[subprocess.Popen[bytes] | None]) -> None:
    while not idle.empty():
        if (process := idle.get()) is not None:
            _end(process)

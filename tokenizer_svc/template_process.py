"""A process that renders chat templates, which are programs of strangers.

    stdin   {"template", "context", "max_chars", "cpu_seconds"}     one JSON object a line
    stdout  {"text"} or {"message", "line"}                         one for each

Jinja's sandbox keeps a template from the process; limits of the operating system keep the process from the
machine. A template that computes for too long is ended by the kernel, process and all; one that wants too
much memory gets a MemoryError.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import traceback
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 512 << 20
FILE_NAME = "<template>"  # as jinja calls a template made from a string
# Whatever a program in Python's data model can raise, short of asking the process to end.
FAULTS = (
    jinja2.TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


class GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it just prints them."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for: Hugging Face's."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


def find_template_problems(source: str) -> list[str]:
    """What is wrong with the template's syntax. Runs nothing of the template."""
    try:
        make_environment().parse(source)
    except jinja2.TemplateSyntaxError as error:
        return [f"chat template: line {error.lineno}: {error.message}"]
    except RecursionError:
        return ["chat template: it is nested too deeply"]
    return []


@lru_cache(maxsize=8)
def compile_template(source: str) -> jinja2.Template:
    return make_environment().from_string(source)


def render(source: str, context: dict[str, Any], max_chars: int) -> str:
    """The rendered text; a ValueError if it is longer than `max_chars`."""
    parts: list[str] = []
    room = max_chars
    for part in compile_template(source).generate(context):
        parts.append(part)
        room -= len(part)
        if room < 0:
            raise ValueError(f"its text is longer than {max_chars} characters")
    return "".join(parts)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    signal.setitimer(signal.ITIMER_PROF, request["cpu_seconds"])
    try:
        return {"text": render(request["template"], request["context"], request["max_chars"])}
    except MemoryError as error:
        return {"message": f"it needs more than {MAX_MEMORY_BYTES >> 20} MiB", "line": template_line(error)}
    except FAULTS as error:
        return {"message": str(error) or type(error).__name__, "line": template_line(error)}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def template_line(error: BaseException) -> int | None:
    """The template's line that failed; None for what a template raises on purpose."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    if type(error) is jinja2.TemplateError:
        return None
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_filename == FILE_NAME
    ]
    return lines[-1] if lines else None


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(answer(json.loads(line))).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

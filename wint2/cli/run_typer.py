"""Turns a function with typer's annotations into a command whose mistakes are one line."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer
from typer.main import get_command

from wint2.errors import CommandError


def run_typer(function: Callable[..., None], arguments: list[str]) -> None:
    """Parses the arguments and calls the function. Raises CommandError for wrong ones."""
    name = function.__name__.replace("_", "-")
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(function)
    try:
        code = get_command(app).main(arguments, prog_name=f"wint2 {name}", standalone_mode=False)
    except typer.TyperException as error:
        raise CommandError(error.format_message()) from error
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    if code:
        sys.exit(code)

"""`wint2 serve`: the local stack under one command."""

from __future__ import annotations

import sys

from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from wint2.errors import CommandError
from wint2.fastdeploy import RefusedFlagError, translate
from wint2.launcher import serve
from wint2.settings import ServeSettings


def main(arguments: list[str]) -> None:
    settings, notes = read_settings(arguments)
    for note in notes:
        print(f"note: {note}", file=sys.stderr, flush=True)
    serve(settings)


def read_settings(arguments: list[str]) -> tuple[ServeSettings, list[str]]:
    """The command line, FastDeploy's words included, and notes for its author. Raises CommandError."""
    try:
        translation = translate(arguments)
        settings = CliApp.run(ServeSettings, cli_args=translation.arguments)
    except RefusedFlagError as error:
        raise CommandError(str(error)) from error
    except SettingsError as error:
        raise CommandError(str(error).removeprefix("error parsing CLI: ")) from error
    except ValidationError as error:
        raise CommandError(
            "; ".join(_explain(item["loc"], item["msg"]) for item in error.errors())
        ) from error
    if settings.cache_queue_port is not None:
        translation.notes.append("--cache-queue-port is not needed: the KV cache has no port here")
    return settings, translation.notes


def _explain(location: tuple[int | str, ...], message: str) -> str:
    name = "-".join(str(part) for part in location).replace("_", "-")
    return f"--{name}: {message[:1].lower()}{message[1:]}"

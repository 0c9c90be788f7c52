"""The `wint2` command: a table of commands, each in a module of its own, imported when it is asked for."""

from __future__ import annotations

import sys
from importlib import import_module

from wint2.errors import CommandError

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "serve": "start tokenizer, worker and gateway: OpenAI's HTTP API and gRPC",
    "chat": "talk to a model in the terminal",
    "complete": "complete a prompt",
    "quantize": "make a 2-bit checkpoint of a full-precision one",
    "inspect": "say what a checkpoint holds: formats, bits, sizes, checksums",
    "eval": "measure a checkpoint's perplexity, and its distance from another",
    "doctor": "look at this machine, and at a checkpoint, and say what would go wrong",
    "probe": "ask a service whether it is healthy",
    "version": "print the versions of this package and what it stands on",
}

HELP = "Serve 2-bit (WINT2) Mixture-of-Experts models.\n\nusage: wint2 COMMAND [OPTIONS]\n\n"


def main(arguments: list[str] | None = None) -> None:
    """Runs a command. Wrong input ends the process with 2, a failure with 1; a line on stderr says why."""
    words = sys.argv[1:] if arguments is None else arguments
    if not words or words[0] in ("--help", "-h", "help"):
        print(HELP + "".join(f"  {name:<10} {text}\n" for name, text in COMMANDS.items()))
        print("wint2 COMMAND --help tells the rest.")
        return
    try:
        _run(words[0], words[1:])
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(name: str, arguments: list[str]) -> None:
    name = "version" if name == "--version" else name
    if name not in COMMANDS:
        raise CommandError(f"no command {name!r}; there are {', '.join(COMMANDS)}")
    import_module(f"wint2.cli.{name}").main(arguments)

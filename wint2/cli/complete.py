"""`wint2 complete`: a prompt's completion, streamed to standard output."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from wint2.cli import options
from wint2.cli.run_typer import run_typer


def complete(
    prompt: Annotated[str, typer.Argument(help='text to go on from; "-" reads standard input')],
    url: options.Url = options.DEFAULT_URL,
    model: options.Model = "",
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    max_tokens: options.MaxTokens = 64,
    seed: options.Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="ends the completion; may be repeated")] = None,
    echo: Annotated[bool, typer.Option(help="print the prompt first")] = False,
    api_key: options.ApiKey = "",
) -> None:
    """Complete a prompt: on a running server, or with --model DIR in this process."""
    client = options.connect(url, api_key, model)
    text = sys.stdin.read() if prompt == "-" else prompt
    body = options.sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    if echo:
        print(text, end="", flush=True)
    for piece in client.complete({"model": client.model, "prompt": text, "stop": stop or [], **body}):
        print(piece, end="", flush=True)
    print()


def main(arguments: list[str]) -> None:
    run_typer(complete, arguments)

"""The options that `wint2 chat` and `wint2 complete` share."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from wint2.http_client import HttpClient

Url = Annotated[str, typer.Option(help="server to ask", envvar="WINT2_URL")]
ApiKey = Annotated[str, typer.Option(help="sent as a bearer token", envvar="WINT2_API_KEY")]
Model = Annotated[
    str, typer.Option(help="a name the server offers; or a checkpoint's directory, to answer in this process")
]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; absent: the server's default")]
TopP = Annotated[float | None, typer.Option(help="nucleus mass in [0, 1]")]
MaxTokens = Annotated[int | None, typer.Option(help="longest answer, in tokens")]
Seed = Annotated[int | None, typer.Option(help="same seed, same answer")]

DEFAULT_URL = "http://127.0.0.1:8180"


class Client(Protocol):
    """Whoever answers: a server, or an engine in this process."""

    @property
    def model(self) -> str:
        """The model's name."""

    def chat(self, payload: dict[str, Any]) -> Iterator[str]:
        """The pieces of the answer to a conversation."""

    def complete(self, payload: dict[str, Any]) -> Iterator[str]:
        """The pieces of a completion."""


def connect(url: str, api_key: str, model: str) -> Client:
    """The client for these options; torch is loaded only for an engine in this process."""
    if model and Path(model).is_dir():
        client: Client = import_module("wint2.local_client").LocalClient(Path(model))
        return client
    return HttpClient(url, api_key, model)


def sampling(**parameters: float | int | None) -> dict[str, Any]:
    """The parameters that were given, as a part of the request's body."""
    return {name: value for name, value in parameters.items() if value is not None}

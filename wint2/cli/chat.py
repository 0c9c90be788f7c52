"""`wint2 chat`: a conversation in the terminal, streamed, with its history."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from wint2.cli import options
from wint2.cli.run_typer import run_typer
from wint2.errors import CommandError

HELP = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."

Message = dict[str, str]
Answer = Callable[[list[Message]], Iterator[str]]


def chat(
    prompt: Annotated[str | None, typer.Argument(help="answer this and end; absent: a conversation")] = None,
    url: options.Url = options.DEFAULT_URL,
    model: options.Model = "",
    system: Annotated[str, typer.Option(help="system message")] = "",
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    max_tokens: options.MaxTokens = None,
    seed: options.Seed = None,
    api_key: options.ApiKey = "",
) -> None:
    """Talk to a model: a running server's, or with --model DIR one in this process."""
    client = options.connect(url, api_key, model)
    body: dict[str, Any] = {
        "model": client.model,
        **options.sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed),
    }
    conversation = Conversation(lambda messages: client.chat({**body, "messages": messages}), system)
    if prompt is not None:
        conversation.say(prompt)
        return
    print(f"{client.model}. {HELP}")
    conversation.run()


class Conversation:
    """What was said so far, and how it goes on."""

    def __init__(self, answer: Answer, system: str) -> None:
        self._answer = answer
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._history: list[Message] = []

    def run(self) -> None:
        """Reads and answers until the user ends it."""
        while (text := _read_line()) not in (None, "/exit"):
            if text == "/clear":
                self._history.clear()
            elif text:
                self._try_to_say(text)

    def say(self, text: str) -> None:
        """Prints the answer as it comes, and remembers both. What Ctrl-C cuts off is remembered too."""
        self._history.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece in self._answer([*self._system, *self._history]):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not pieces:
                raise
        print()
        self._history.append({"role": "assistant", "content": "".join(pieces)})

    def _try_to_say(self, text: str) -> None:
        """A turn that fails is taken back; the conversation goes on."""
        length = len(self._history)
        try:
            self.say(text)
        except KeyboardInterrupt:
            del self._history[length:]
            print()
        except CommandError as error:
            del self._history[length:]
            print(f"error: {error}")


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def main(arguments: list[str]) -> None:
    run_typer(chat, arguments)

"""The small files beside a tokenizer's vocabulary: special tokens, added tokens, chat templates.

tokenizer_config.json       named special tokens, added_tokens_decoder, chat_template, add_bos_token
special_tokens_map.json     named special tokens, additional_special_tokens
added_tokens.json           content -> id
generation_config.json      eos_token_id
chat_template.jinja         the chat template; goes before the one in tokenizer_config.json
chat_template.json          the same, in an object
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizer_svc.added_tokens import AddedToken, AddedTokens
from tokenizer_svc.errors import TokenizerLoadError

SPECIAL_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
EXTRA_NAMES = ("additional_special_tokens", "extra_special_tokens")


class ModelFolder:
    """Reads what is there and collects what is wrong, so that one error can tell all of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        if not path.is_dir():
            raise TokenizerLoadError(
                [f"{path}: {'not a directory' if path.exists() else 'no such directory'}"]
            )
        self.config = self.read_json("tokenizer_config.json")
        self._special_map = self.read_json("special_tokens_map.json")
        self.special_tokens = self._read_special_tokens()

    def check(self) -> None:
        if self.problems:
            raise TokenizerLoadError(self.problems)

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in the file; {} if there is no such file."""
        text = self.read_text(name)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except ValueError as error:
            self.problems.append(f"{self.path / name}: not valid JSON: {error}")
            return {}
        if not isinstance(value, dict):
            self.problems.append(f"{self.path / name}: holds a {type(value).__name__}, not an object")
            return {}
        return value

    def read_text(self, name: str) -> str | None:
        """The file's text; None if there is no such file."""
        try:
            return (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            self.problems.append(f"{self.path / name}: not UTF-8 text: {error.reason} at byte {error.start}")
        except OSError as error:
            self.problems.append(f"{self.path / name}: {(error.strerror or str(error)).lower()}")
        return None

    def read_flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        return value if isinstance(value, bool) else default

    def read_eos_token_ids(self) -> tuple[int, ...]:
        """generation_config.json's eos_token_id, one or several."""
        value = self.read_json("generation_config.json").get("eos_token_id")
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and item >= 0 for item in values):
            path = self.path / "generation_config.json"
            self.problems.append(f"{path}: eos_token_id is {value!r}, not one or more token ids")
            return ()
        return tuple(values)

    def read_chat_templates(self) -> dict[str, str]:
        """Templates by name; "default" is the one for conversations without tools."""
        templates = self._named_templates(
            self.read_json("chat_template.json").get("chat_template") or self.config.get("chat_template")
        )
        if (text := self.read_text("chat_template.jinja")) is not None:
            templates["default"] = text
        for path in sorted(self.path.glob("additional_chat_templates/*.jinja")):
            templates[path.stem] = self.read_text(str(path.relative_to(self.path))) or ""
        return templates

    def added_tokens(self, base: Iterable[AddedToken], id_of: Callable[[str], int | None]) -> AddedTokens:
        """`base`, the folder's own added tokens, and the named special tokens that the vocabulary knows."""
        tokens = {token.content: token for token in (*base, *self._listed_tokens())}
        for content in {*self.special_tokens.values(), *self._extra_special_tokens()}:
            token_id = id_of(content)
            if content in tokens:
                tokens[content] = replace(tokens[content], is_special=True)
            elif token_id is not None:
                tokens[content] = AddedToken(token_id, content, is_special=True)
        return AddedTokens(tuple(sorted(tokens.values(), key=lambda token: token.id)))

    def _read_special_tokens(self) -> dict[str, str]:
        merged = {**self._special_map, **self.config}
        found = {name: _content(merged.get(name)) for name in SPECIAL_NAMES}
        return {name: content for name, content in found.items() if content}

    def _extra_special_tokens(self) -> Iterator[str]:
        for source in (self._special_map, self.config):
            for name in EXTRA_NAMES:
                value = source.get(name) or []
                for item in value.values() if isinstance(value, dict) else value:
                    if content := _content(item):
                        yield content

    def _listed_tokens(self) -> Iterator[AddedToken]:
        for content, token_id in self.read_json("added_tokens.json").items():
            if isinstance(token_id, int) and token_id >= 0:
                yield AddedToken(token_id, content, is_special=False)
            else:
                self.problems.append(
                    f"{self.path / 'added_tokens.json'}: {content!r} has {token_id!r} where an id belongs"
                )
        yield from parse_added_tokens(
            [
                {**entry, "id": int(key)}
                for key, entry in (self.config.get("added_tokens_decoder") or {}).items()
                if key.isdigit() and isinstance(entry, dict)
            ]
        )

    def _named_templates(self, value: Any) -> dict[str, str]:
        if value is None:
            return {}
        entries = [{"name": "default", "template": value}] if isinstance(value, str) else value
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in entries}
        except (KeyError, TypeError):
            self.problems.append(
                f"{self.path / 'tokenizer_config.json'}: chat_template is neither a string "
                'nor a list of {"name", "template"}'
            )
            return {}


def parse_added_tokens(entries: Iterable[dict[str, Any]]) -> Iterator[AddedToken]:
    """Entries as tokenizer.json lists them; a KeyError or TypeError if they are not."""
    for entry in entries:
        yield AddedToken(
            int(entry["id"]),
            str(entry["content"]),
            is_special=bool(entry.get("special", False)),
            lstrip=bool(entry.get("lstrip", False)),
            rstrip=bool(entry.get("rstrip", False)),
            single_word=bool(entry.get("single_word", False)),
        )


def _content(value: Any) -> str | None:
    """A special token, written as a string or as an object with "content"."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None

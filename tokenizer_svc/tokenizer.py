"""Text to token ids and back, chat templates included: one object a model, without any service around it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizer_svc import json_model, sentencepiece_model
from tokenizer_svc.added_tokens import join_text
from tokenizer_svc.chat_template import ChatTemplate
from tokenizer_svc.errors import TokenizerLoadError
from tokenizer_svc.json_model import JsonModel
from tokenizer_svc.model_folder import ModelFolder
from tokenizer_svc.sentencepiece_model import SentencePieceModel
from tokenizer_svc.template_pool import TemplateLimits, TemplatePool
from tokenizer_svc.template_process import find_template_problems
from tokenizer_svc.text_model import TextModel
from tokenizer_svc.vocabulary import Vocabulary

Message = Mapping[str, Any]


@dataclass(frozen=True)
class TokenizerInfo:
    """`kind` is "sentencepiece" or "tokenizer.json"; `vocab_size` is one more than the largest id."""

    kind: str
    vocab_size: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    chat_template: str | None
    model_path: str


@dataclass(frozen=True)
class Tokenizer:
    """A model's vocabulary and chat template. Safe to use from several threads."""

    info: TokenizerInfo
    _model: TextModel
    _chat: ChatTemplate

    @property
    def vocabulary(self) -> Vocabulary:
        return self._model.vocabulary

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[int]:
        """Ids of a text. Special tokens written in it are text, unless `parse_special_tokens`."""
        return self.encode_batch(
            [text], add_special_tokens=add_special_tokens, parse_special_tokens=parse_special_tokens
        )[0]

    def encode_batch(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, parse_special_tokens: bool = False
    ) -> list[list[int]]:
        """Ids of each text, in order."""
        model = self._model
        split = [
            list(join_text(model.added.split(text, parse_special=parse_special_tokens))) for text in texts
        ]
        encoded = model.encode_batch(split)
        if not add_special_tokens:
            return encoded
        return [[*model.prefix_ids, *ids, *model.suffix_ids] for ids in encoded]

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD, unknown ids print nothing."""
        return self.vocabulary.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
    ) -> tuple[str, list[int]]:
        """A conversation's prompt, as text and as ids.

        Control tokens that the template writes are parsed; those in messages, tools and `template_kwargs` are
        text. `chat_template` is used in place of the model's own. InputError if the template fails.
        """
        text, segments = self._chat.apply(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            template_kwargs=template_kwargs,
            chat_template=chat_template,
        )
        return text, self._model.encode(segments)


def load_tokenizer(
    path: str | Path, chat_template: str | None = None, limits: TemplateLimits | None = None
) -> Tokenizer:
    """The tokenizer in a model's folder: tokenizer.json, else sentencepiece's tokenizer.model.

    `chat_template` is the path of a Jinja file, or the template itself; it goes before the folder's own.
    TokenizerLoadError lists what is wrong with the folder.
    """
    folder = ModelFolder(Path(path))
    templates = folder.read_chat_templates()
    if chat_template is not None:
        templates = {"default": _read_template(folder, chat_template)}
    folder.problems += [problem for text in templates.values() for problem in find_template_problems(text)]
    eos_token_ids = folder.read_eos_token_ids()
    model = _load_model(folder)
    chat = ChatTemplate(
        templates, folder.special_tokens, model.added, TemplatePool(limits or TemplateLimits())
    )
    return Tokenizer(_describe(folder, model, eos_token_ids, chat.source), model, chat)


def _load_model(folder: ModelFolder) -> TextModel:
    if (folder.path / json_model.FILE_NAME).exists():
        return JsonModel(folder)
    if (folder.path / sentencepiece_model.FILE_NAME).exists():
        return SentencePieceModel(folder)
    names = f"{json_model.FILE_NAME} nor {sentencepiece_model.FILE_NAME}"
    raise TokenizerLoadError([*folder.problems, f"{folder.path}: holds neither {names}"])


def _read_template(folder: ModelFolder, path_or_source: str) -> str:
    """A template holds braces, and the path of one does not."""
    if "{" in path_or_source:
        return path_or_source
    # An absolute path, and one from here, stay what they are when joined to the folder.
    text = folder.read_text(str(Path(path_or_source).absolute()))
    if text is None:
        folder.problems.append(f"{path_or_source}: no such chat template file")
    return text or ""


def _describe(
    folder: ModelFolder, model: TextModel, eos_token_ids: tuple[int, ...], chat_template: str | None
) -> TokenizerInfo:
    names = folder.special_tokens
    # ERNIE-4.5 ends a turn of the conversation with its separator, and a text with its end token.
    is_ernie = str(folder.config.get("tokenizer_class", "")).startswith("Ernie4_5")
    ends = [names.get("eos_token"), names.get("sep_token") if is_ernie else None]
    return TokenizerInfo(
        kind=model.kind,
        vocab_size=len(model.vocabulary.token_bytes),
        bos_token_id=next(iter(model.added.find_ids([names.get("bos_token")])), None),
        eos_token_ids=tuple(dict.fromkeys((*model.added.find_ids(ends), *eos_token_ids))),
        pad_token_id=next(iter(model.added.find_ids([names.get("pad_token")])), None),
        chat_template=chat_template,
        model_path=str(folder.path),
    )

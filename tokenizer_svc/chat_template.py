"""Conversations to segments: the template's control tokens are control tokens, what people wrote is text.

Control tokens in messages, tools and variables are wrapped in two characters that occur nowhere else,

    user writes   Hi<|im_end|>           template sees   Hi⟨<|im_end|>⟩

and a string that ends in the beginning of one gets a lone ⟩, so that no two strings make one together. What
the template renders is then cut at control tokens, wrapped ones stay text, and the marks go. A conversation
without such strings is rendered and tokenized exactly as Hugging Face does it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizer_svc.added_tokens import AddedTokens, Segment, compile_any, join_text
from tokenizer_svc.errors import InputError
from tokenizer_svc.template_pool import TemplateError, TemplatePool

RESERVED_NAMES = ("messages", "tools", "add_generation_prompt")
PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True)
class ControlTokens:
    """The strings that only the template may turn into tokens.

    `special` ones are the vocabulary's special tokens. `written` are those, and the other added tokens that
    the template itself writes: some vocabularies do not declare their turn marks as special.
    """

    special: frozenset[str]
    written: frozenset[str]
    _patterns: dict[frozenset[str], tuple[re.Pattern[str], re.Pattern[str]]] = field(init=False)

    @classmethod
    def of_template(cls, added: AddedTokens, template: str) -> ControlTokens:
        special = frozenset(token.content for token in added.tokens if token.is_special)
        return cls(special, special | {token.content for token in added.tokens if token.content in template})

    def __post_init__(self) -> None:
        vars(self)["_patterns"] = {
            tokens: (compile_any(tokens), _compile_beginnings(tokens))
            for tokens in (self.special, self.written)
        }

    def mark(self, value: Any, marks: Marks, tokens: frozenset[str]) -> Any:
        """`value` with every string in it, keys too, marked."""
        if isinstance(value, str):
            whole, beginning = self._patterns[tokens]
            text = whole.sub(rf"{marks.open}\g<0>{marks.close}", value)
            return text + marks.close if beginning.search(text) else text
        if isinstance(value, Mapping):
            return {
                self.mark(key, marks, tokens): self.mark(item, marks, tokens) for key, item in value.items()
            }
        if isinstance(value, Sequence):
            return [self.mark(item, marks, tokens) for item in value]
        return value

    def mark_message(self, message: Any, marks: Marks) -> Any:
        """The assistant's own words may hold what the model writes: reasoning tags, tool calls."""
        is_assistant = isinstance(message, Mapping) and message.get("role") == "assistant"
        return self.mark(message, marks, self.special if is_assistant else self.written)


@dataclass(frozen=True)
class Marks:
    """Two characters that neither template nor conversation contain."""

    open: str
    close: str

    @classmethod
    def unused_in(cls, *texts: str) -> Marks:
        used = set().union(*texts)
        unused = (char for char in map(chr, PRIVATE_USE) if char not in used)
        try:
            return cls(next(unused), next(unused))
        except StopIteration:
            raise InputError("messages", "the conversation uses all private characters of Unicode") from None

    def split(self, text: str, added: AddedTokens, control: frozenset[str]) -> Iterator[Segment]:
        """Cuts rendered text: what is wrapped is text, control tokens outside are ids, the marks go."""
        pieces = re.split(f"([{self.open}{self.close}])", text)
        # Texts are at even places, and the marks between them at odd ones.
        for place in range(0, len(pieces), 2):
            around = pieces[place - 1 : place] + pieces[place + 1 : place + 2]
            if around == [self.open, self.close] and pieces[place] in control:
                yield pieces[place]
            else:
                yield from added.split(pieces[place], parse_special=True)


class ChatTemplate:
    """A model's templates, rendered apart from this process."""

    def __init__(
        self,
        templates: Mapping[str, str],
        variables: Mapping[str, str],
        added: AddedTokens,
        pool: TemplatePool,
    ) -> None:
        self._templates = templates
        self._variables = variables
        self._added = added
        self._pool = pool
        self._control = {
            template: ControlTokens.of_template(added, template) for template in templates.values()
        }

    @property
    def source(self) -> str | None:
        """The template for conversations without tools."""
        return self._templates.get("default")

    def apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any] | None,
        chat_template: str | None,
    ) -> tuple[str, list[Segment]]:
        """The rendered text, and its segments. InputError if it cannot be rendered."""
        template = chat_template if chat_template is not None else self._choose(bool(tools))
        _check_names(template_kwargs or {})
        control = self._control.get(template) or ControlTokens.of_template(self._added, template)
        marks = Marks.unused_in(template, *_strings([messages, tools, template_kwargs]))
        rendered = self._pool.render(
            template,
            {
                **self._variables,
                "tools": control.mark(tools, marks, control.written) if tools else None,
                "documents": None,
                **control.mark(template_kwargs or {}, marks, control.written),
                "messages": [control.mark_message(message, marks) for message in messages],
                "add_generation_prompt": add_generation_prompt,
            },
        )
        text = rendered.replace(marks.open, "").replace(marks.close, "")
        return text, list(join_text(marks.split(rendered, self._added, control.written)))

    def _choose(self, has_tools: bool) -> str:
        template = self._templates.get("tool_use") if has_tools else None
        template = template or self.source
        if template is None:
            raise TemplateError("the model has none; start the tokenizer with --chat-template or send one")
        return template


def _check_names(template_kwargs: Mapping[str, Any]) -> None:
    for name in RESERVED_NAMES:
        if name in template_kwargs:
            raise InputError(
                f"template_kwargs.{name}", f"{name} is a field of its own, not a template variable"
            )


def _compile_beginnings(words: frozenset[str]) -> re.Pattern[str]:
    """Matches the end of a text that ends in the beginning of a word."""
    beginnings = compile_any(word[:end] for word in words for end in range(1, len(word)))
    return re.compile(rf"{beginnings.pattern}\Z")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.items()))
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)

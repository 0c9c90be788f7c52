"""Structured output for the model in a folder: the engine's grammars over the tokenizer's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gpu_worker.config import ModelConfig
from gpu_worker.engine.errors import RequestError
from gpu_worker.engine.llguidance_grammars import LlguidanceGrammars, TokenTexts
from tokenizer_svc.errors import TokenizerLoadError
from tokenizer_svc.tokenizer import Tokenizer, load_tokenizer


def load_grammars(model: ModelConfig) -> LlguidanceGrammars:
    """The tokenizer is loaded when the first structured request comes, which is refused if there is none."""
    return make_grammars(model, load_tokenizer)


def make_grammars(model: ModelConfig, load: Callable[[Path], Tokenizer]) -> LlguidanceGrammars:
    return LlguidanceGrammars(lambda: _texts(model.path, load), model.vocab_size, model.eos_token_ids)


def _texts(path: Path, load: Callable[[Path], Tokenizer]) -> TokenTexts:
    try:
        vocabulary = load(path).vocabulary
    except TokenizerLoadError as error:
        raise RequestError("structured_output", f"needs the model's tokenizer: {error}") from error
    return TokenTexts(vocabulary.token_bytes, vocabulary.special_ids)

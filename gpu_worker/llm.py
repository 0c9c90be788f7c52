"""`LLM`: a model, offline, in this process: prompts in, completions out, no server.

llm = LLM(model="path/to/model")
for output in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
    print(output.outputs.text)
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gpu_worker.config import ModelConfig
from gpu_worker.engine.build import build_engine
from gpu_worker.engine.errors import EngineArgsError, RequestError
from gpu_worker.engine.grammars import Grammars
from gpu_worker.engine.sequence import Request
from gpu_worker.llm_arguments import read_arguments
from gpu_worker.llm_completions import PendingRequest, spell_bad_words
from gpu_worker.llm_prompts import (
    Messages,
    Prompt,
    read_conversations,
    read_params,
    read_prompt,
    split_prompts,
)
from gpu_worker.outputs import RequestOutput
from gpu_worker.sampling_params import SamplingParams
from gpu_worker.structured import make_grammars
from tokenizer_svc.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)


class LLM:
    """An engine and its tokenizer. Not for use from several threads at once.

    Further keywords are those of the worker's flags (`max_num_seqs`, `enable_prefix_caching`, `device`, ...);
    FastDeploy's and vLLM's are understood too. Raises ConfigError, CheckpointError and TokenizerLoadError for
    what is wrong with the folder, EngineArgsError for what cannot be done, TypeError for an unknown keyword.
    """

    def __init__(
        self,
        model: str | Path,
        tensor_parallel_size: int = 1,
        use_cudagraph: bool = True,
        dtype: str | torch.dtype = "auto",
        max_model_len: int | None = None,
        skip_tokenizer_init: bool = False,
        tokenizer: str | Path | None = None,
        chat_template: str | None = None,
        **keywords: Any,
    ) -> None:
        keywords |= {
            "tensor_parallel_size": tensor_parallel_size,
            "use_cudagraph": use_cudagraph,
            "dtype": dtype,
            "max_model_len": max_model_len,
        }
        if not Path(model).is_dir():
            message = f"{model}: no such directory; nothing is downloaded: give the checkpoint's directory"
            raise EngineArgsError("model", message)
        args, notes = read_arguments(model, keywords)
        self._tokenizer = None if skip_tokenizer_init else load_tokenizer(tokenizer or model, chat_template)
        with _loading_bar(str(model)) as progress:
            built = build_engine(args, progress, self._make_grammars)
        for line in (*built.description, *notes):
            logger.info(line)
        self._model, self._engine = built.model, built.engine
        weakref.finalize(self, built.close)
        self._num_requests = 0

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError if `skip_tokenizer_init` left it out."""
        if self._tokenizer is None:
            raise ValueError("this needs the tokenizer, which skip_tokenizer_init=True left out")
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts: texts, lists of token ids, or dicts with `prompt` or `prompt_token_ids`.

        The results are in the prompts' order. One SamplingParams serves all prompts; a list has one for each.
        Raises RequestError or ContextLengthError, naming the prompt, before anything is computed.
        """
        inputs = [self._encode(*read_prompt(prompt)) for prompt in split_prompts(prompts)]
        return self._run(inputs, read_params(sampling_params, len(inputs)), use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answers a conversation, or each of several."""
        inputs = [
            self.get_tokenizer().apply_chat_template(
                conversation,
                add_generation_prompt=add_generation_prompt,
                tools=tools,
                template_kwargs=chat_template_kwargs,
                chat_template=chat_template,
            )
            for conversation in read_conversations(messages)
        ]
        return self._run(list(inputs), read_params(sampling_params, len(inputs)), use_tqdm)

    def _make_grammars(self, model: ModelConfig) -> Grammars:
        return make_grammars(model, lambda path: self.get_tokenizer())

    def _encode(self, text: str | None, token_ids: list[int] | None) -> tuple[str | None, list[int]]:
        if token_ids is None:
            token_ids = self.get_tokenizer().encode(text or "", parse_special_tokens=True)
        return text, token_ids

    def _run(
        self, inputs: list[tuple[str | None, list[int]]], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        pending: dict[str, PendingRequest] = {}
        try:
            for position, ((text, token_ids), one) in enumerate(zip(inputs, params, strict=True)):
                request = self._add(position, token_ids, one)
                pending[request.request_id] = PendingRequest(request, text, self._tokenizer)
            with tqdm(total=len(pending), desc="prompts", disable=not use_tqdm) as bar:
                while self._engine.has_work:
                    self._step(pending, bar)
        finally:
            for request_id in pending:
                self._engine.abort(request_id)
            self._engine.take_outputs()
        return [request.result for request in pending.values()]

    def _add(self, position: int, token_ids: list[int], params: SamplingParams) -> Request:
        if params.stop or params.bad_words:
            params = spell_bad_words(params, self.get_tokenizer())
        self._num_requests += 1
        name = f"llm-{self._num_requests}"
        request = Request(name, token_ids, params, arrival_time=time.monotonic())
        try:
            self._engine.add(request)
        except RequestError as error:
            error.add_note(f"in prompt {position}")
            raise
        return request

    def _step(self, pending: Mapping[str, PendingRequest], bar: tqdm[Any]) -> None:
        for output in self._engine.step():
            request = pending[output.request_id]
            if request.take(output):
                self._engine.abort(output.request_id, output.index)
            if request.result.finished and not request.is_counted:
                request.is_counted = True
                bar.update()


@contextmanager
def _loading_bar(name: str) -> Iterator[Any]:
    with tqdm(desc=f"loading {name}", unit="B", unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress

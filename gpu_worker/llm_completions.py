"""From the engine's outputs to completions with text, for `LLM`."""

from __future__ import annotations

from dataclasses import replace

from gpu_worker.engine.sequence import Request, StepOutput
from gpu_worker.outputs import CompletionOutput, CompletionOutputs, RequestOutput, read_logprobs
from gpu_worker.sampling_params import SamplingParams
from tokenizer_svc.detokenizer import IncrementalDetokenizer, Piece
from tokenizer_svc.tokenizer import Tokenizer


def spell_bad_words(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The parameters with each bad word as runs of tokens: as it begins a text, and after a space."""
    texts = [space + word.lstrip() for word in params.bad_words for space in ("", " ")]
    runs = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    spelled = dict.fromkeys((*params.bad_words_token_ids, *filter(None, runs)))
    return replace(params, bad_words=(), bad_words_token_ids=tuple(spelled))


class PendingRequest:
    """Gathers a request's outputs; without a tokenizer, the token ids alone."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer | None) -> None:
        completions = CompletionOutputs(CompletionOutput(index) for index in range(request.params.n))
        self.result = RequestOutput(request.request_id, prompt, list(request.prompt_token_ids), completions)
        self.is_counted = False
        self._detokenizers = (
            [self._detokenizer(request, tokenizer) for _ in completions] if tokenizer else None
        )

    def take(self, output: StepOutput) -> bool:
        """Adds an output; True if a stop string now ends a completion that the engine would go on with."""
        completion = self.result.outputs[output.index]
        if completion.finish_reason is not None:
            return False
        self._add_tokens(completion, output)
        completion.finish_reason = output.finish_reason
        completion.stop_reason = output.stop_token_id
        is_cut = self._add_text(completion)
        self._note(output)
        return is_cut and output.finish_reason is None

    def _add_tokens(self, completion: CompletionOutput, output: StepOutput) -> None:
        completion.token_ids += output.token_ids
        if output.logprobs is not None:
            completion.logprobs = (completion.logprobs or []) + read_logprobs(output.logprobs)
            total = completion.cumulative_logprob or 0.0
            completion.cumulative_logprob = total + sum(entry.sampled.logprob for entry in output.logprobs)
        self._new_token_ids = output.token_ids

    def _add_text(self, completion: CompletionOutput) -> bool:
        """Adds the text that is certain by now; True if a stop string was met in it."""
        if self._detokenizers is None:
            return False
        detokenizer = self._detokenizers[completion.index]
        piece = detokenizer.push(self._new_token_ids)
        completion.text += piece.text
        if piece.matched_stop is None and completion.finish_reason is not None:
            piece = detokenizer.finish()
            completion.text += piece.text
        return self._stop(completion, piece)

    def _stop(self, completion: CompletionOutput, piece: Piece) -> bool:
        if piece.matched_stop is None:
            return False
        completion.finish_reason, completion.stop_reason = "stop", piece.matched_stop
        return True

    def _note(self, output: StepOutput) -> None:
        result = self.result
        if output.index == 0:
            result.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            result.prompt_logprobs = [None, *read_logprobs(output.prompt_logprobs)]
        if output.timings is not None:
            result.metrics = output.timings
        if output.error is not None:
            result.error_code, result.error_msg = 500, output.error
        result.finished = all(completion.finish_reason is not None for completion in result.outputs)

    def _detokenizer(self, request: Request, tokenizer: Tokenizer) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=request.params.skip_special_tokens,
            stop=request.params.stop,
            include_stop=request.params.include_stop_str_in_output,
            prefix_token_ids=request.prompt_token_ids,
        )

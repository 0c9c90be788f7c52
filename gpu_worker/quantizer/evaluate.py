"""Perplexity, KL divergence and top-1 agreement with a reference, layer by layer: no model is held whole."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from gpu_worker.quantizer.runner import LayerRunner
from gpu_worker.quantizer.source import Source

_ROWS = 256  # whose logits exist at a time


@dataclass(frozen=True)
class Evaluation:
    """What windows of text say of a model. KL is in nats a token, KL(reference ‖ model)."""

    num_tokens: int
    perplexity: float
    reference_perplexity: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(eq=False)
class _Sums:
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    count: int = 0


OnProgress = Callable[[str, int, int], None]  # what is being done, done, total


def evaluate(
    model: Source,
    token_ids_ST: Tensor,
    reference: Source | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Evaluation:
    """Predict every token of int64 windows [S, T] but their first, from those before it in its window."""
    sources = [model] if reference is None else [model, reference]
    total = sum(source.config.num_hidden_layers for source in sources)
    normed: list[Tensor] = []
    done = 0
    for source in sources:
        hidden_STD, runner = source.embed(token_ids_ST), LayerRunner(source)
        for layer in range(source.config.num_hidden_layers):
            on_progress("evaluating", done, total)
            hidden_STD = runner.run(layer, hidden_STD)
            done += 1
        normed.append(runner.final_norm(hidden_STD)[:, :-1].flatten(0, 1))
    on_progress("evaluating", done, total)
    return _compare(normed, [source.head() for source in sources], token_ids_ST[:, 1:].flatten())


def _compare(normed: list[Tensor], heads: list[Tensor], targets_R: Tensor) -> Evaluation:
    targets_R = targets_R.to(normed[0].device)
    sums = _Sums(count=len(targets_R))
    for start in range(0, len(targets_R), _ROWS):
        rows = slice(start, start + _ROWS)
        logs = [functional.log_softmax(x[rows] @ head, dim=-1) for x, head in zip(normed, heads, strict=True)]
        _add(sums, logs[0], logs[-1], targets_R[rows])
    perplexity = math.exp(sums.nll / sums.count)
    if len(normed) == 1:
        return Evaluation(sums.count, perplexity)
    reference = math.exp(sums.reference_nll / sums.count)
    return Evaluation(
        sums.count, perplexity, reference, max(0.0, sums.kl / sums.count), sums.agreed / sums.count
    )


def _add(sums: _Sums, log_RV: Tensor, reference_RV: Tensor, targets_R: Tensor) -> None:
    sums.nll += float(functional.nll_loss(log_RV, targets_R, reduction="sum"))
    sums.reference_nll += float(functional.nll_loss(reference_RV, targets_R, reduction="sum"))
    sums.kl += float((reference_RV.exp() * (reference_RV - log_RV)).sum())
    sums.agreed += int((log_RV.argmax(-1) == reference_RV.argmax(-1)).sum())

"""End-to-end tuning: a quantized model moves, in the formats it is stored in, towards what the original says.

Codes and local scales stay as the encoder left them. Weights of norms, the experts' column scales and the
projections outside the experts follow the gradient of KL(original ‖ quantized) on windows of text, the
original's own or anybody's, and are written back in the formats they had: no bit more is stored. Both models
are in memory whole, so this is for models that fit.
Shapes: S windows, T tokens each, R rows (S·T), D hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gpu_worker.model.config_reader import read_model_config
from gpu_worker.quantizer import sampling
from gpu_worker.quantizer.recipe import Tuning
from gpu_worker.quantizer.source import Source
from gpu_worker.quantizer.tunable import Held, Tunable

_BETAS = 0.9, 0.95
_WARM_UP = 20  # steps, or a quarter of all
_REHEARSALS = 3  # before a CUDA graph is recorded
_ROWS = 2048  # whose logits exist at a time

OnProgress = Callable[[str, int, int], None]  # what is being done, done, total
Learn = Callable[[Tensor], Tensor]  # windows to the loss, and gradients left with the model's parameters


def tune(
    source: Source, directory: Path, ids_ST: Tensor, tuning: Tuning, on_progress: OnProgress
) -> list[float]:
    """Tune the checkpoint of ours in `directory` towards `source`; returns the losses, nats a token.

    `ids_ST` are the windows to learn from, or what the original's own begin with.
    """
    device = source.device
    if tuning.samples:
        begin = sampling.openings(ids_ST, tuning.samples)
        ids_ST = sampling.sample(source.config, begin, ids_ST.shape[1], device, on_progress)
    model, original = Tunable(read_model_config(directory), device, tuning), Held(source.config, device)
    optimizer = torch.optim.Adam(model.groups(), betas=_BETAS, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, tuning.steps))
    batches = _batches(ids_ST.to(device), tuning.batch)
    learn = _learner(model, original, next(batches))
    losses: list[Tensor] = []
    for step in range(tuning.steps):
        on_progress("tuning", step, tuning.steps)
        losses.append(learn(next(batches)))
        optimizer.step()
        schedule.step()
    on_progress("tuning", tuning.steps, tuning.steps)
    with torch.no_grad():
        model.write()
    return torch.stack(losses).tolist()


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine."""
    warm_up = min(_WARM_UP, max(1, steps // 4))
    return min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


def _batches(ids_ST: Tensor, size: int) -> Iterator[Tensor]:
    """So many windows each time, in a shuffled order, over and over."""
    generator = torch.Generator().manual_seed(0)
    size = min(size, len(ids_ST))
    while True:
        order = torch.randperm(len(ids_ST), generator=generator)
        for start in range(0, len(ids_ST) - size + 1, size):
            yield ids_ST[order[start : start + size].to(ids_ST.device)]


def _learner(model: Tunable, original: Held, ids_ST: Tensor) -> Learn:
    """How gradients of batches like this one are found."""
    if model.device.type == "cuda" and model.is_static:
        return _Recorded(model, original, ids_ST)
    return lambda batch_ST: _learn(model, original, batch_ST)


class _Recorded:
    """A batch's work as one CUDA graph: ten thousand kernels that take longer to launch than to run."""

    def __init__(self, model: Tunable, original: Held, ids_ST: Tensor) -> None:
        self._ids_ST = ids_ST.clone()
        rehearsal = torch.cuda.Stream()
        rehearsal.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(rehearsal):
            for _ in range(_REHEARSALS):
                _learn(model, original, self._ids_ST)
        torch.cuda.current_stream().wait_stream(rehearsal)
        model.forget_gradients()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = _learn(model, original, self._ids_ST)

    def __call__(self, ids_ST: Tensor) -> Tensor:
        self._ids_ST.copy_(ids_ST)
        self._graph.replay()
        return self._loss.clone()


def _learn(model: Tunable, original: Held, ids_ST: Tensor) -> Tensor:
    """Give the model's parameters their gradients; returns KL(original ‖ model), the mean over the tokens."""
    model.forget_gradients()
    with _mixed_precision(model.device):
        with torch.no_grad():
            goal_RD = original.hidden(ids_ST)
        found_RD = model.hidden(ids_ST)
        with torch.no_grad():
            loss, gradient_RD = _divergence(found_RD, goal_RD, model.head(), original.head())
    found_RD.backward(gradient_RD)
    return loss


def _divergence(
    found_RD: Tensor, goal_RD: Tensor, head_DV: Tensor, goal_head_DV: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by `found`: one softmax less the other. Some rows at a time, since the logits
    of all would be the largest tensor by far."""
    loss, gradient_RD = found_RD.new_zeros(()), torch.empty_like(found_RD)
    for start in range(0, len(found_RD), _ROWS):
        rows = slice(start, start + _ROWS)
        goal_RV = (goal_RD[rows] @ goal_head_DV).float().log_softmax(dim=-1)
        found_RV = (found_RD[rows] @ head_DV).float().log_softmax(dim=-1)
        chance_RV = goal_RV.exp()
        loss += (chance_RV * (goal_RV - found_RV)).sum()
        gradient_RD[rows] = ((found_RV.exp() - chance_RV) @ head_DV.T).float()
    return loss / len(found_RD), gradient_RD / len(found_RD)


def _mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 products where the machine has instructions for them."""
    has_bf16 = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=has_bf16)

"""Op `route`: which experts a token goes to, and with what weights.

    p = softmax(logits)                      float32
    ids = top-k of p + correction bias       the bias takes part in the choice only; ties: lower id first
    weights = p[ids] / max(sum p[ids], norm_min)

as ERNIE 4.5 routes (Hugging Face's Ernie4_5_MoeTopKRouter).
Shapes: T tokens, E experts, A activated experts per token.
"""

from __future__ import annotations

import torch


def route(
    logits_TE: torch.Tensor, correction_bias_E: torch.Tensor, num_experts_per_token: int, norm_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_ids [T, A] int32, expert_weights [T, A] float32), the best expert first."""
    probabilities_TE = torch.softmax(logits_TE.float(), dim=-1)
    scores_TE = probabilities_TE + correction_bias_E
    ids_TE = torch.argsort(scores_TE, dim=-1, descending=True, stable=True)
    ids_TA = ids_TE[:, :num_experts_per_token]
    weights_TA = probabilities_TE.gather(-1, ids_TA)
    weights_TA = weights_TA / weights_TA.sum(-1, keepdim=True).clamp(min=norm_min)
    return ids_TA.int(), weights_TA

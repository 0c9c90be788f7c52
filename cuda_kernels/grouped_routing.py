"""Op `route_grouped`: the choice of experts of DeepSeek-V3, in groups.

    s = sigmoid(logits)
    a group's score = the sum of its two best s + bias;  only the best groups' experts take part
    ids = top-k of s + bias among them                   ties: lower id first
    weights = scale · s[ids], divided by their sum if normalized

Shapes: T tokens, E experts, N groups, A activated experts per token.
"""

from __future__ import annotations

import torch

_BEST_OF_GROUP = 2
_SUM_MIN = 1e-20


def route_grouped(
    logits_TE: torch.Tensor,
    correction_bias_E: torch.Tensor,
    num_experts_per_token: int,
    num_groups: int,
    num_chosen_groups: int,
    is_normalized: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(expert_ids [T, A] int32, expert_weights [T, A] float32), the best expert first."""
    scores_TE = logits_TE.float().sigmoid()
    choice_TE = scores_TE + correction_bias_E
    if num_chosen_groups < num_groups:
        choice_TE = _only_best_groups(choice_TE, num_groups, num_chosen_groups)
    ids_TA = torch.argsort(choice_TE, dim=-1, descending=True, stable=True)[:, :num_experts_per_token]
    weights_TA = scores_TE.gather(-1, ids_TA)
    if is_normalized:
        weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + _SUM_MIN)
    return ids_TA.int(), weights_TA * scale


def _only_best_groups(choice_TE: torch.Tensor, num_groups: int, num_chosen: int) -> torch.Tensor:
    """Minus infinity for the experts of the other groups."""
    choice_TNE = choice_TE.unflatten(-1, (num_groups, -1))
    group_TN = choice_TNE.topk(min(_BEST_OF_GROUP, choice_TNE.shape[-1]), dim=-1).values.sum(-1)
    order_TN = torch.argsort(group_TN, dim=-1, descending=True, stable=True)
    is_chosen_TN = torch.zeros_like(group_TN, dtype=torch.bool).scatter_(1, order_TN[:, :num_chosen], True)
    masked_TNE: torch.Tensor = choice_TNE.masked_fill(~is_chosen_TN.unsqueeze(-1), -torch.inf)
    return masked_TNE.flatten(1)

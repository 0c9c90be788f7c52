"""Log-probabilities of sampled tokens and of their likeliest rivals, for the requests that ask."""

from __future__ import annotations

import torch

from gpu_worker.engine.sequence import PositionLogprobs, TokenLogprob
from gpu_worker.engine.sequence_table import Rows
from gpu_worker.sampling_params import MAX_LOGPROBS


class LogprobReader:
    """Log-probabilities of the model's own distribution, taken before the sampler edits it."""

    def __init__(self, logits_SV: torch.Tensor, positions: Rows) -> None:
        self._positions = positions
        at = torch.from_numpy(positions).to(logits_SV.device)
        self._logprobs = torch.log_softmax(logits_SV[at], dim=-1)
        self._top = self._logprobs.topk(min(MAX_LOGPROBS, logits_SV.shape[1]), dim=-1)

    def read(self, token_ids: Rows, num_top_S: Rows) -> dict[int, PositionLogprobs]:
        """By position in the step: the sampled token's log-probability and as many top ones as asked for."""
        sampled_ids = token_ids[self._positions]
        at = torch.from_numpy(sampled_ids).to(self._logprobs.device)[:, None]
        sampled = self._logprobs.gather(1, at).squeeze(1).tolist()
        ids, values = self._top.indices.tolist(), self._top.values.tolist()
        return {
            position: PositionLogprobs(
                TokenLogprob(token_id, logprob),
                tuple(map(TokenLogprob, ids[i][: num_top_S[position]], values[i][: num_top_S[position]])),
            )
            for i, (position, token_id, logprob) in enumerate(
                zip(self._positions.tolist(), sampled_ids.tolist(), sampled, strict=True)
            )
        }

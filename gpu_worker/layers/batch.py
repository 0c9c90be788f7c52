"""The tensors of one engine step: what `Decoder.forward` reads besides its weights and the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cuda_kernels.paged_attention import AttentionPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """Prefill chunks and decodes of S sequences, T new tokens in all, the tokens of a sequence side by side.

    A token's slot is `block_id * block_size + offset`; slot -1 marks a padding token, whose result nobody
    reads. `context_lens_S` counts a sequence's cached and new tokens, so its last new token sits at position
    `context_len - 1`. Rows of `block_tables_SM` beyond a sequence's blocks hold any valid block id.
    """

    input_ids_T: torch.Tensor  # int64
    positions_T: torch.Tensor  # int64
    slot_mapping_T: torch.Tensor  # int64
    block_tables_SM: torch.Tensor  # int32, M = most blocks a sequence of this step has
    cu_seqlens_q: torch.Tensor  # int32 [S + 1], new tokens before each sequence
    context_lens_S: torch.Tensor  # int32
    max_query_len: int
    sample_rows_S: torch.Tensor  # int64, row in T of each sequence's last new token
    attention_plan: AttentionPlan | None = None  # the decoder's, made once for all layers

    @property
    def num_tokens(self) -> int:
        return self.input_ids_T.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.context_lens_S.shape[0]

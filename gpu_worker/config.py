"""The worker's configuration: frozen, composed, every "auto" resolved once by building a new object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cuda_kernels.formats.layout import KOrder

QuantFormat = Literal["none", "wint8", "wint4", "wint2", "wint2t"]


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """Which weights are stored how, read from config.json's `quantization_config`.

    MoE layers up to and including `wint4_end_layer` hold WINT4 experts, those after them WINT2 up to and
    including `wint2_end_layer`, and any beyond are WINT4 again.
    """

    dense: QuantFormat = "none"
    experts_low: QuantFormat = "none"  # layers <= wint4_end_layer, and > wint2_end_layer
    experts_high: QuantFormat = "none"  # layers between
    wint4_end_layer: int = -1
    group_size: int = 64
    wint2_end_layer: int | None = None  # None: the model's last
    k_order: KOrder | None = None  # of WINT2 rows, where the checkpoint says it

    def expert_format(self, layer: int) -> QuantFormat:
        is_beyond = self.wint2_end_layer is not None and layer > self.wint2_end_layer
        return self.experts_low if layer <= self.wint4_end_layer or is_beyond else self.experts_high


@dataclass(frozen=True, slots=True)
class GroupedRouting:
    """DeepSeek-V3's choice of experts: by sigmoid scores, among the best groups only."""

    num_groups: int
    num_chosen_groups: int
    is_normalized: bool
    scale: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A mixture-of-experts decoder, in the words of Hugging Face's Ernie4_5_MoeConfig."""

    path: Path
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    compression_ratio: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_experts: int
    num_experts_per_token: int
    moe_intermediate_size: int
    num_shared_experts: int
    moe_layer_start_index: int
    moe_layer_end_index: int
    moe_layer_interval: int
    norm_min: float
    eos_token_ids: tuple[int, ...]
    quantization: QuantizationConfig
    # What other families than ERNIE add.
    dense_layers: tuple[int, ...] = ()  # though the three keys above would make them mixtures
    shared_intermediate_size: int = 0  # of the shared experts together; 0: a multiple of the routed ones'
    has_shared_gate: bool = False  # a sigmoid of the input scales the shared expert
    has_qkv_bias: bool = False
    qk_norm: Literal["none", "head", "all"] = "none"  # RMS norm of each query or key head, or of all
    grouped_routing: GroupedRouting | None = None  # None: softmax

    @property
    def shared_size(self) -> int:
        """Hidden features of the shared experts; 0 without any."""
        return self.shared_intermediate_size or self.num_shared_experts * self.moe_intermediate_size

    def is_moe_layer(self, layer: int) -> bool:
        in_range = self.moe_layer_start_index <= layer <= self.moe_layer_end_index
        return in_range and layer not in self.dense_layers and (layer + 1) % self.moe_layer_interval == 0


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    block_size: int = 64
    num_blocks: int = 0
    enable_prefix_caching: bool = True
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 32768
    enable_chunked_prefill: bool = True
    priority_seconds: float = 30.0  # one step of priority counts as that much later an arrival


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine is built from."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    device: torch.device
    dtype: torch.dtype
    tensor_parallel_size: int = 1
    use_cudagraph: bool = True
    overlap: bool = False  # plan the next step, and tell of the last, while the device computes one
    seed: int = 0  # of the seeds given to requests that bring none

"""A model folder to a Decoder: the plan's weights read one by one, brought to the device and its layout."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from cuda_kernels.compiled import compile_kernels
from cuda_kernels.cpu.panels import Activations, PanelExperts
from cuda_kernels.formats.layout import KOrder
from cuda_kernels.linear import pack_dense
from cuda_kernels.moe import ExpertWeights, StreamedExperts, pack_experts
from cuda_kernels.rope import cos_sin_table
from gpu_worker.config import ModelConfig
from gpu_worker.layers.attention import Attention
from gpu_worker.layers.embedding import Embedding
from gpu_worker.layers.linear import Linear, PanelSwiGLU, SwiGLU
from gpu_worker.layers.moe import MoE, Router
from gpu_worker.layers.norm import RMSNorm, SharedRMSNorm
from gpu_worker.layers.ranks import ALONE, Ranks
from gpu_worker.model.checkpoint import open_checkpoint
from gpu_worker.model.cpu_weights import has_panels, panel_experts, panel_head, panel_linear
from gpu_worker.model.decoder import Decoder, DecoderLayer, MemoryReport
from gpu_worker.model.dummy import plan_dummy
from gpu_worker.model.gpu_weights import can_stream, can_stream_experts, stream_experts, stream_linear
from gpu_worker.model.heap import trim_heap
from gpu_worker.model.k_order import KOrderChoice, choose_k_order
from gpu_worker.model.pinned import PinnedTransfer
from gpu_worker.model.plan import LayerPlan, MLPPlan, ModelPlan, MoEPlan, plan_model
from gpu_worker.model.safetensors_file import Transfer, keep
from gpu_worker.model.sharding import shard_config, shard_plan
from gpu_worker.model.stored_weight import StoredLinear, StoredVector

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
LoadFormat = Literal["auto", "dummy"]


def load_model(
    config: ModelConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress | None = None,
    k_order: KOrderChoice = "auto",
    load_format: LoadFormat = "auto",
    activations: Activations = "float32",
    ranks: Ranks = ALONE,
) -> Decoder:
    """Load the checkpoint in `config.path`, or random weights of its shapes if `load_format` is "dummy".

    `progress` is called with (bytes read, bytes to read). Quantized weights are decoded to `dtype`; `k_order`
    is that of the WINT2 ones, "auto" finds it out. `activations` are those that quantized weights are
    multiplied with on a CPU. Of a group's `ranks` each loads its part, all of them at the same time.
    Raises CheckpointError with everything that is wrong with
    the files, before any weight is read.
    """
    whole = _plan(config, device, load_format)
    plan = _part(whole, config, ranks)
    for note in plan.notes:
        _log.info("%s", note)
    if has_panels(device, dtype):
        _log.info("compiling the CPU kernels, unless Numba's cache has them")
        _log.info("CPU kernels are ready, %.1f s", compile_kernels())
    # Of the whole model, so that all ranks find the same.
    order = _k_order(_part(whole, config, ALONE), k_order, config.quantization.k_order)
    part = shard_config(config, ranks)
    loader = _Loader(part, device, dtype, order, activations, plan.stored_bytes, progress, ranks)
    return loader.decoder(plan)


def _plan(config: ModelConfig, device: torch.device, load_format: LoadFormat) -> ModelPlan:
    if load_format == "dummy":
        return plan_dummy(config, device)
    return plan_model(config, open_checkpoint(config.path, _transfer_to(device)))


def _part(plan: ModelPlan, config: ModelConfig, ranks: Ranks) -> ModelPlan:
    return plan if plan.num_ranks == ranks.size == 1 else shard_plan(plan, config, ranks)


def _k_order(plan: ModelPlan, choice: KOrderChoice, recorded: KOrder | None) -> KOrder:
    finding = choose_k_order(plan, choice, recorded)
    if finding is None:
        return "shuffled"
    _log.info("rows of WINT2 groups are in %s order (%s)", finding.k_order, finding.evidence)
    return finding.k_order


def _transfer_to(device: torch.device) -> Transfer:
    return keep if device.type == "cpu" else PinnedTransfer(device)


class _Loader:
    """Turns a plan's stored weights into the layers, counting bytes as it goes."""

    def __init__(
        self,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        k_order: KOrder,
        activations: Activations,
        total_bytes: int,
        progress: Progress | None,
        ranks: Ranks,
    ) -> None:
        self._config, self._device, self._dtype, self._k_order = config, device, dtype, k_order
        self._activations = activations
        self._ranks = ranks
        self._total_bytes, self._progress = total_bytes, progress
        # Kernels for weights in their stored formats compute in bfloat16.
        self._streams = device.type == "cuda" and dtype == torch.bfloat16
        self._has_panels = has_panels(device, dtype)
        self._stored: Counter[str] = Counter()
        self._held: Counter[str] = Counter()

    def decoder(self, plan: ModelPlan) -> Decoder:
        config = self._config
        table = cos_sin_table(
            config.max_position_embeddings,
            config.head_dim,
            config.rope_theta,
            compression_ratio=config.compression_ratio,
        ).to(self._device)
        embedding_VD = self._embedding(plan.embedding)
        return Decoder(
            config,
            Embedding(embedding_VD, self._ranks.stretch(config.vocab_size).start, self._ranks),
            tuple(self._layer(layer, table) for layer in plan.layers),
            self._norm(plan.final_norm),
            self._head(plan.lm_head, embedding_VD),
            MemoryReport(dict(self._stored), dict(self._held)),
            self._ranks,
        )

    def _layer(self, plan: LayerPlan, cos_sin_PC: torch.Tensor) -> DecoderLayer:
        config = self._config
        attention = Attention(
            self._linear(plan.qkv),
            self._linear(plan.o),
            cos_sin_PC,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            self._tensor(plan.qkv_bias) if plan.qkv_bias else None,
            self._head_norm(plan.q_norm) if plan.q_norm else None,
            self._head_norm(plan.k_norm) if plan.k_norm else None,
        )
        mlp = self._moe(plan.mlp) if isinstance(plan.mlp, MoEPlan) else self._mlp(plan.mlp)
        norms = self._norm(plan.input_norm), self._norm(plan.post_attention_norm)
        trim_heap()
        return DecoderLayer(norms[0], attention, norms[1], mlp, self._ranks)

    def _moe(self, plan: MoEPlan) -> MoE:
        shared = self._mlp(plan.shared) if plan.shared else None
        shared_gate = self._linear(plan.shared_gate) if plan.shared_gate else None
        return MoE(self._router(plan), self._experts(plan), shared, shared_gate, plan.num_splits)

    def _router(self, plan: MoEPlan) -> Router:
        config = self._config
        return Router(
            self._linear(plan.router, torch.float32),
            self._bias(plan.correction_bias),
            config.num_experts_per_token,
            config.norm_min,
            config.grouped_routing,
        )

    def _experts(self, plan: MoEPlan) -> ExpertWeights | StreamedExperts | PanelExperts:
        """Expert by expert, so that the decoded weights of one layer at most exist beside the packed ones."""
        experts: ExpertWeights | StreamedExperts | PanelExperts
        if self._has_panels:
            experts = self._panels(plan.experts)
        elif self._streams and can_stream_experts(plan.experts):
            experts = stream_experts(plan.experts, self._k_order, self._count)
        else:
            num_activated = self._config.num_experts_per_token * plan.num_splits
            experts = pack_experts(self._decoded(plan), len(plan.experts), num_activated)
        self._held["experts"] += experts.nbytes
        return experts

    def _decoded(self, plan: MoEPlan) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for expert in plan.experts:
            yield self._dense(expert.up_gate), self._dense(expert.down)

    def _panels(self, experts: Sequence[MLPPlan]) -> PanelExperts:
        panels = panel_experts(experts, self._k_order, self._activations)
        for expert in experts:
            self._count(expert.up_gate)
            self._count(expert.down)
        return panels

    def _mlp(self, plan: MLPPlan) -> SwiGLU | PanelSwiGLU:
        if self._has_panels:
            network = self._panels([plan])
            self._held[plan.down.kind] += network.nbytes
            return PanelSwiGLU(network)
        return SwiGLU(self._linear(plan.up_gate, is_gated=True), self._linear(plan.down))

    def _norm(self, stored: StoredVector) -> RMSNorm:
        return RMSNorm(self._tensor(stored), self._config.rms_norm_eps)

    def _head_norm(self, stored: StoredVector) -> RMSNorm:
        """Of each head by itself, or of all heads together, which then are on all ranks."""
        if self._ranks.size == 1 or self._config.qk_norm == "head":
            return self._norm(stored)
        return SharedRMSNorm(self._tensor(stored), self._config.rms_norm_eps, self._ranks)

    def _bias(self, stored: StoredVector | None) -> torch.Tensor:
        if stored is None:
            return torch.zeros(self._config.num_experts, device=self._device)
        return self._tensor(stored, torch.float32).flatten()

    def _head(self, stored: StoredLinear | None, embedding_VD: torch.Tensor) -> Linear:
        if stored is not None:
            return self._linear(stored)
        if self._has_panels:
            head = Linear(panel_head(embedding_VD, self._activations))
            self._held["head"] += head.nbytes
            return head
        weight = pack_dense(embedding_VD)
        if weight.is_packed:
            self._held["head"] += weight.nbytes
        return Linear(weight)

    def _linear(
        self, stored: StoredLinear, dtype: torch.dtype | None = None, *, is_gated: bool = False
    ) -> Linear:
        if self._has_panels:
            linear = Linear(panel_linear(stored, self._k_order, self._activations))
            self._count(stored)
        elif self._streams and can_stream(stored):
            linear = Linear(stream_linear(stored, is_gated=is_gated))
            self._count(stored)
        else:
            linear = Linear(pack_dense(self._dense(stored, dtype)))
        self._held[stored.kind] += linear.nbytes
        return linear

    def _embedding(self, stored: StoredVector) -> torch.Tensor:
        """As stored where the head's kernel takes it so: a row is brought to float32 when it is looked up."""
        keeps = self._has_panels and stored.ranks[0].dtype == torch.bfloat16
        return self._tensor(stored, torch.bfloat16 if keeps else None)

    def _dense(self, stored: StoredLinear, dtype: torch.dtype | None = None) -> torch.Tensor:
        weight_NK = stored.dense(self._k_order).to(self._device, dtype or self._dtype)
        self._count(stored)
        return weight_NK

    def _tensor(self, stored: StoredVector, dtype: torch.dtype | None = None) -> torch.Tensor:
        # Copied, for a tensor of the mapped file would end with the file.
        tensor = stored.dense().to(self._device, dtype or self._dtype, copy=True)
        self._count(stored)
        self._held[stored.kind] += tensor.nbytes
        return tensor

    def _count(self, stored: StoredLinear | StoredVector) -> None:
        """A weight is on its device: nobody needs the file's pages."""
        stored.release()
        self._stored[stored.kind] += stored.stored_bytes
        if self._progress is not None:
            self._progress(self._stored.total(), self._total_bytes)

"""The worker's flags and environment variables."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from protos.rpc.settings import ServiceSettings, StringList, service_config


class WorkerSettings(ServiceSettings):
    """Serves one model on one GPU, or on the CPU: token ids in, token ids out, over gRPC.

    Every flag may be given in the environment instead: --max-model-len as WINT2_WORKER_MAX_MODEL_LEN.
    """

    model_config = service_config("gpu_worker", "WINT2_WORKER_")

    model: Path = Field(description="directory of the checkpoint: config.json and *.safetensors")
    listen: str = Field(
        "127.0.0.1:8191", description='gRPC address: "host:port" (port 0 takes a free one) or "unix:/path"'
    )
    advertise: str | None = Field(
        None, description="address that gateways are told to use; default: the one listened on"
    )
    scheduler: StringList = Field(
        (), description="address of a scheduler (a gateway's gRPC port) to register with; may be repeated"
    )
    served_model_name: str | None = Field(
        None, description="name that clients use; default: the directory's name"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="arithmetic of activations; auto: bfloat16 on a GPU, float32 on the CPU"
    )
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="auto reads the checkpoint's weights; dummy makes random ones of the same shape"
    )
    k_order: Literal["auto", "shuffled", "natural"] = Field(
        "auto", description="order of rows in a WINT2 file's 64-groups; auto finds it out from the weights"
    )
    cpu_activations: Literal["auto", "int8", "float32"] = Field(
        "auto",
        description="what a CPU multiplies quantized weights with; auto: int8 where it has AVX-512 VNNI",
    )
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model")
    max_model_len: int | None = Field(
        None, ge=2, description="longest prompt plus completion, in tokens; default: what the model allows"
    )
    max_num_seqs: int | None = Field(
        None,
        ge=1,
        description="most sequences in a step; default: 256, but no more than KV blocks",
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="most tokens in a step; default: 2048 to 8192, by the device's memory"
    )
    block_size: int = Field(64, ge=1, description="tokens in a KV block")
    num_kv_blocks: int | None = Field(
        None, ge=1, description="KV blocks in all; default: what the memory plan allows"
    )
    kv_cache_memory_gib: float | None = Field(
        None, gt=0, description="memory of the KV cache; default: what the memory plan allows"
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = Field(
        "auto",
        description="what the KV cache holds; auto: as --dtype; int8 and fp8 (e4m3): a byte a number, and a "
        "float32 scale for each token and head",
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of the GPU's memory that weights, cache and activations may take"
    )
    enable_prefix_caching: bool = Field(True, description="share the KV blocks of equal prefixes")
    enable_chunked_prefill: bool = Field(
        True, description="cut long prompts, so that running completions go on meanwhile"
    )
    use_cudagraph: bool = Field(True, description="replay decode steps as CUDA graphs")
    seed: int = Field(0, ge=0, description="seeds the requests that bring no seed of their own")
    stall_timeout: float = Field(
        60.0,
        gt=0,
        description="seconds without a step, though there is work, after which health is NOT_SERVING",
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="HTTP port of GET /metrics; default: none"
    )
    vllm_grpc: bool = Field(
        False,
        description="serve vllm.grpc.engine.VllmEngine too, for gateways made for vLLM (PyPI smg)",
    )
    count_expert_tokens: bool = Field(
        False, description="publish how many tokens each expert was given; takes a little of every step"
    )
    metrics_compat: Literal["none", "vllm"] = Field(
        "none", description='"vllm" publishes every metric under the vllm: prefix too'
    )

    @model_validator(mode="after")
    def _one_size_of_the_cache(self) -> Self:
        if self.num_kv_blocks is not None and self.kv_cache_memory_gib is not None:
            raise ValueError("--num-kv-blocks and --kv-cache-memory-gib exclude each other")
        return self

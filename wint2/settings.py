"""What `wint2 serve` takes from its command line and the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from protos.rpc.settings import StringList

Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]

DEFAULT_GRPC_PORT = 8182


class ServeSettings(BaseSettings):
    """Start the whole stack on this machine: tokenizer, worker(s) and gateway, as child processes.

    Ctrl-C or SIGTERM drains and ends all of them; a second one ends them at once. A flag that is not given
    leaves the choice to the service concerned; `python -m gateway --help` and the like tell its default, and
    further flags, which are set by the environment (--max-choices by WINT2_GATEWAY_MAX_CHOICES).
    FastDeploy's other flags are understood: each is translated, noted as needless, or refused with a reason.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="WINT2_SERVE_",
        cli_prog_name="wint2 serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_exit_on_error=False,
    )

    model: Path = Field(description="directory of the checkpoint: config.json, tokenizer, *.safetensors")
    served_model_name: str | None = Field(None, description="name that clients use (the directory's name)")
    tokenizer: Path | None = Field(None, description="directory of the tokenizer (the model's directory)")
    chat_template: Path | None = Field(None, description="file with a Jinja chat template to use instead")

    host: str = Field("0.0.0.0", description="address of the HTTP server")
    port: Port = Field(8180, description="port of the HTTP server: OpenAI's API, /health, /metrics")
    metrics_port: Port | None = Field(None, description="serve /metrics on a port of its own as well")
    workers: Count = Field(1, description="gateway processes that share the HTTP port")
    grpc_port: Port | None = Field(
        None,
        description=f"port of the gateway's gRPC API ({DEFAULT_GRPC_PORT}, or the next no other flag names)",
    )
    engine_worker_queue_port: Port | None = Field(
        None, description="the worker's gRPC port; further workers take the next ones (a private unix socket)"
    )
    cache_queue_port: int | None = Field(
        None, description="accepted for FastDeploy's sake; no such port is needed"
    )

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model is computed")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="arithmetic of the activations")
    load_format: Literal["auto", "dummy"] = Field("auto", description="dummy: random weights, for benchmarks")
    k_order: Literal["auto", "shuffled", "natural"] = Field(
        "auto", description="order of rows in WINT2 files (auto finds it out)"
    )
    cpu_activations: Literal["auto", "int8", "float32"] = Field(
        "auto", description="on a CPU: 8-bit activations are faster (auto: where it has AVX-512 VNNI)"
    )
    tensor_parallel_size: Count = Field(1, description="GPUs that share one model")
    data_parallel_size: Count = Field(1, description="workers, each with a model and GPUs of its own")
    use_cudagraph: bool = Field(True, description="replay decode steps from CUDA graphs")
    seed: int = Field(0, ge=0, description="seed of the requests that bring none")

    max_model_len: Count | None = Field(None, description="longest prompt plus completion, in tokens")
    max_num_seqs: Count | None = Field(None, description="most sequences in a step")
    max_num_batched_tokens: Count | None = Field(None, description="most tokens in a step")
    block_size: Count | None = Field(None, description="tokens in a KV block")
    num_kv_blocks: Count | None = Field(None, description="KV blocks in all (as many as fit)")
    kv_cache_memory_gib: float | None = Field(
        None, gt=0, description="GiB for the KV cache, instead of blocks"
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "int8", "fp8"] = Field(
        "auto", description="numbers of the KV cache; int8, fp8: half of bfloat16's memory"
    )
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="share of the GPU's memory to use"
    )
    enable_prefix_caching: bool = Field(True, description="share KV blocks between prompts that begin alike")
    enable_chunked_prefill: bool = Field(
        True, description="cut long prompts into pieces between decode steps"
    )

    api_key: StringList = Field((), repr=False, description="key that clients must send; may be repeated")
    api_key_file: Path | None = Field(None, description="file with one such key a line, read when it changes")
    tls_cert: Path | None = Field(None, description="PEM certificate of every service's gRPC port")
    tls_key: Path | None = Field(None, description="PEM private key of --tls-cert")
    tls_ca: Path | None = Field(None, description="PEM authority that --tls-cert comes from")
    tls_client_auth: bool = Field(False, description="gRPC callers must show a certificate of --tls-ca")
    http_tls_cert: Path | None = Field(None, description="PEM certificate: the HTTP API speaks HTTPS")
    http_tls_key: Path | None = Field(None, description="PEM private key of --http-tls-cert")
    request_timeout: float | None = Field(None, gt=0, description="seconds until a request is ended")
    max_waiting: int | None = Field(None, ge=0, description="most requests that wait for a worker")
    queue_timeout: float | None = Field(None, gt=0, description="seconds until a waiting request is refused")
    drain_timeout: float = Field(30.0, ge=0, description="seconds that running requests get after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    log_format: Literal["text", "json"] = Field("text", description="a readable line an event, or JSON")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child: this process's, output unbuffered, plus `extra`.

    Torch's threads sleep as soon as they have nothing to do, unless OMP_WAIT_POLICY says otherwise: they
    would spin for milliseconds on the cores that a CPU worker's own threads compute on.
    """
    return {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "PYTHONUNBUFFERED": "1", **extra}

"""Which processes make up the stack of `wint2 serve`, and with which command lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wint2.settings import DEFAULT_GRPC_PORT, ServeSettings

# Flags that are the worker's own; None is left out, so that the worker's defaults hold.
WORKER_FLAGS = (
    "device",
    "dtype",
    "load_format",
    "k_order",
    "cpu_activations",
    "tensor_parallel_size",
    "use_cudagraph",
    "seed",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_kv_blocks",
    "kv_cache_memory_gib",
    "kv_cache_dtype",
    "gpu_memory_utilization",
    "enable_prefix_caching",
    "enable_chunked_prefill",
)
GATEWAY_FLAGS = (
    "workers",
    "request_timeout",
    "max_waiting",
    "queue_timeout",
    "metrics_port",
    "api_key_file",
    "http_tls_cert",
    "http_tls_key",
)
TLS_FLAGS = ("tls_cert", "tls_key", "tls_ca", "tls_client_auth")
COMMON_FLAGS = ("drain_timeout", "log_level", "log_format", *TLS_FLAGS)


@dataclass(frozen=True, slots=True)
class Service:
    """One process of the stack."""

    name: str
    command: tuple[str, ...]
    address: str  # its gRPC address, where grpc.health.v1 answers
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stack:
    """The processes in the order of their start, and where the world reaches them."""

    tokenizer: Service
    workers: tuple[Service, ...]
    gateway: Service
    http_url: str
    grpc_address: str
    metrics_url: str

    @property
    def services(self) -> tuple[Service, ...]:
        return (self.tokenizer, self.gateway, *self.workers)


def used_ports(settings: ServeSettings) -> dict[str, int]:
    """Every TCP port that the stack will listen on, by the flag that names it."""
    ports = {"--port": settings.port}
    if settings.metrics_port not in (None, settings.port):
        ports["--metrics-port"] = int(settings.metrics_port or 0)
    if settings.engine_worker_queue_port is not None:
        first = settings.engine_worker_queue_port
        ports |= {
            f"--engine-worker-queue-port{f' + {i}' if i else ''}": first + i for i in _workers(settings)
        }
    ports["--grpc-port"] = settings.grpc_port or _default_grpc_port(set(ports.values()))
    return ports


def plan_stack(settings: ServeSettings, folder: Path) -> Stack:
    """The stack's command lines; `folder` is private to it and takes the unix sockets."""
    grpc_address = f"127.0.0.1:{used_ports(settings)['--grpc-port']}"
    tokenizer = _tokenizer(settings, f"unix:{folder}/tokenizer.sock")
    workers = tuple(_worker(settings, index, folder, grpc_address) for index in _workers(settings))
    scheme = "http" if settings.http_tls_cert is None else "https"
    url = f"{scheme}://{'127.0.0.1' if settings.host in ('0.0.0.0', '::') else settings.host}"
    return Stack(
        tokenizer=tokenizer,
        workers=workers,
        gateway=_gateway(settings, grpc_address, tokenizer.address),
        http_url=f"{url}:{settings.port}",
        grpc_address=grpc_address,
        metrics_url=f"{url}:{settings.metrics_port or settings.port}/metrics",
    )


def _workers(settings: ServeSettings) -> range:
    return range(settings.data_parallel_size)


def _default_grpc_port(taken: set[int]) -> int:
    return next(port for port in range(DEFAULT_GRPC_PORT, 65536) if port not in taken)


def _tokenizer(settings: ServeSettings, address: str) -> Service:
    flags = ["--model", str(settings.tokenizer or settings.model), "--listen", address]
    if settings.chat_template is not None:
        flags += ["--chat-template", str(settings.chat_template)]
    return Service("tokenizer", _python("tokenizer_svc", *flags, *_common(settings)), address)


def _worker(settings: ServeSettings, index: int, folder: Path, scheduler: str) -> Service:
    name = f"worker-{index}" if settings.data_parallel_size > 1 else "worker"
    port = settings.engine_worker_queue_port
    address = f"unix:{folder}/{name}.sock" if port is None else f"127.0.0.1:{port + index}"
    flags = ["--model", str(settings.model), "--listen", address, "--scheduler", scheduler]
    if settings.served_model_name is not None:
        flags += ["--served-model-name", settings.served_model_name]
    command = _python("gpu_worker", *flags, *_flags(settings, WORKER_FLAGS), *_common(settings))
    return Service(name, command, address, _visible_gpus(settings, index))


def _visible_gpus(settings: ServeSettings, index: int) -> dict[str, str]:
    """Several workers take the GPUs in turn, tensor_parallel_size each."""
    if settings.data_parallel_size == 1:
        return {}
    degree = settings.tensor_parallel_size
    return {"CUDA_VISIBLE_DEVICES": ",".join(str(index * degree + rank) for rank in range(degree))}


def _gateway(settings: ServeSettings, address: str, tokenizer: str) -> Service:
    http = ["--http-host", settings.host, "--http-port", str(settings.port)]
    flags = [*http, "--listen", address, "--tokenizer", tokenizer, *_flags(settings, GATEWAY_FLAGS)]
    # A command line can be read by every user of the machine, an environment cannot.
    keys = {"WINT2_GATEWAY_API_KEY": ",".join(settings.api_key)} if settings.api_key else {}
    return Service("gateway", _python("gateway", *flags, *_common(settings)), address, keys)


def _common(settings: ServeSettings) -> Iterator[str]:
    return _flags(settings, COMMON_FLAGS)


def _flags(settings: ServeSettings, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        value, flag = getattr(settings, name), name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{flag}" if value else f"--no-{flag}"
        elif value is not None:
            yield from (f"--{flag}", str(value))


def _python(module: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", module, *arguments)

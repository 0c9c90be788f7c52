"""The only code of the face that touches stubs: the health of a service, and what a worker says of itself."""

from __future__ import annotations

from dataclasses import dataclass

from protos.rpc.channel import open_channel, wait_serving
from protos.rpc.security import PLAINTEXT, Security
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc

PREFIXES = ("", "k", "M", "G", "T")


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """What a worker loaded and how it runs it."""

    model: worker_pb2.GetModelInfoResponse
    server: worker_pb2.GetServerInfoResponse

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each line of the summary."""
        model, server = self.model, self.server
        tokens = server.num_kv_blocks * server.block_size
        return [
            ("device", f"{server.device}, {server.dtype}, tensor parallel {server.tensor_parallel_size}"),
            (
                "model",
                f"{model.served_model_name} ({model.model_type}), context {model.max_model_len} tokens",
            ),
            ("quantization", model.quantization),
            ("weights", f"{_si(model.weight_bytes, 'B')} for {_si(model.num_parameters)} parameters"),
            ("KV cache", f"{server.num_kv_blocks} blocks x {server.block_size} = {tokens} tokens"),
            ("step", f"at most {server.max_num_seqs} sequences, {server.max_num_batched_tokens} tokens"),
        ]


def _si(count: float, unit: str = "") -> str:
    """Three digits and a prefix: 89.1 GB."""
    power = min(max(0, len(str(int(count))) - 1) // 3, len(PREFIXES) - 1)
    return f"{count / 1000**power:.3g} {PREFIXES[power]}{unit}"


async def wait_until_serving(
    address: str, timeout_seconds: float, service: str = "", security: Security = PLAINTEXT
) -> None:
    """Returns once the service at `address` is SERVING. Raises UnavailableError."""
    async with open_channel(address, security) as channel:
        await wait_serving(channel, service, timeout_seconds=timeout_seconds)


async def ask_worker(address: str, security: Security = PLAINTEXT) -> WorkerFacts:
    """Asks a serving worker about its model and itself."""
    async with open_channel(address, security) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        return WorkerFacts(
            model=await stub.GetModelInfo(worker_pb2.GetModelInfoRequest(), timeout=10),
            server=await stub.GetServerInfo(worker_pb2.GetServerInfoRequest(), timeout=10),
        )

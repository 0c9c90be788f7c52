"""How a worker is introduced to a scheduler, whether it registers or is asked."""

from __future__ import annotations

from protos.wint2.scheduler.v1.scheduler_pb2 import WorkerRegistration
from protos.wint2.worker.v1.worker_pb2 import GetModelInfoResponse, GetServerInfoResponse


def registration(
    model: GetModelInfoResponse, server: GetServerInfoResponse, address: str
) -> WorkerRegistration:
    """`address` is where others reach the worker; it stands in for an instance id that is missing."""
    return WorkerRegistration(
        instance_id=server.instance_id or address,
        address=address,
        model=model.served_model_name,
        max_model_len=model.max_model_len,
        max_num_seqs=server.max_num_seqs,
        kv_cache_tokens=server.num_kv_blocks * server.block_size,
        eos_token_ids=model.eos_token_ids,
        quantization=model.quantization,
        device=server.device,
    )

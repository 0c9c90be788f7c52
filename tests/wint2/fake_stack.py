"""A stack of fake services under the real launcher: `fake_stack.py FOLDER [SERVICE=BEHAVIOUR …]`.

Behaviours: serve; refuse (one `error:` line, exit code 2); crash (two lines and exit code 3, once it serves);
stubborn (ignores SIGTERM); slow (takes half a second to end); never (starts, and never says SERVING).
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path

from protos.rpc.process import Shutdown, fail, run_service
from protos.rpc.server import GrpcServer
from protos.rpc.server import Service as RpcService
from protos.wint2.worker.v1 import worker_pb2, worker_pb2_grpc
from wint2.errors import CommandError
from wint2.launcher import Launcher
from wint2.stack import Service, Stack

DESCRIPTOR = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]


class FakeWorker(worker_pb2_grpc.WorkerServiceServicer):
    async def GetModelInfo(self, request, context):
        return worker_pb2.GetModelInfoResponse(
            served_model_name="fake",
            model_type="ernie4_5_moe",
            max_model_len=128,
            quantization="experts 0-1 wint2",
        )

    async def GetServerInfo(self, request, context):
        return worker_pb2.GetServerInfoResponse(
            device="cpu", dtype="float32", tensor_parallel_size=1, block_size=64, num_kv_blocks=10
        )


async def serve(shutdown: Shutdown, address: str, behaviour: str) -> None:
    if behaviour == "refuse":
        fail("--model: experts.3.up is 12 bytes short")
    server = GrpcServer(address, [DESCRIPTOR])
    await server.start()
    server.add(RpcService(DESCRIPTOR, worker_pb2_grpc.add_WorkerServiceServicer_to_server, FakeWorker()))
    if behaviour == "never":
        await asyncio.sleep(600)
    if behaviour == "crash":
        asyncio.get_running_loop().call_later(1.0, crash)
    await server.serve(shutdown, drain_timeout_seconds=1.0)
    if behaviour == "slow":
        await asyncio.sleep(0.5)
    print(f"{address.rpartition('/')[2]} ended", flush=True)
    if behaviour == "stubborn":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(600)


def crash() -> None:
    print("the device fell off the bus\nNVRM: Xid 79", flush=True)
    import os

    os._exit(3)


def fake(name: str, folder: Path, behaviour: str) -> Service:
    address = f"unix:{folder}/{name}.sock"
    return Service(name, (sys.executable, __file__, "--child", address, behaviour), address)


def main() -> None:
    if sys.argv[1] == "--child":
        run_service(lambda shutdown: serve(shutdown, *sys.argv[2:]))
    folder = Path(sys.argv[1])
    behaviours = {"tokenizer": "serve", "worker": "serve", "gateway": "serve"}
    behaviours |= dict(word.split("=") for word in sys.argv[2:])
    services = {name: fake(name, folder, behaviour) for name, behaviour in behaviours.items()}
    stack = Stack(
        services["tokenizer"],
        (services["worker"],),
        services["gateway"],
        "http://h:1",
        "h:2",
        "http://h:1/metrics",
    )
    try:
        asyncio.run(Launcher(stack, drain_seconds=1.0).run())
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""`python -m tokenizer_svc --model DIR`: loads a tokenizer and serves it."""

from __future__ import annotations

import asyncio
import logging
import sys

from protos.rpc.process import Shutdown, run_service
from protos.rpc.server import GrpcServer, Service
from protos.rpc.telemetry import configure_logging
from protos.rpc.tracing import configure_tracing
from protos.wint2.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from tokenizer_svc.errors import TokenizerLoadError
from tokenizer_svc.servicer import TokenizerServicer
from tokenizer_svc.settings import TokenizerSettings
from tokenizer_svc.tokenizer import TokenizerInfo, load_tokenizer

DESCRIPTOR = tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"]

logger = logging.getLogger(__name__)


async def main(settings: TokenizerSettings, shutdown: Shutdown) -> None:
    configure_logging(settings.log_level, "tokenizer", settings.log_format)
    configure_tracing("tokenizer", settings.tracing_endpoint)
    server = GrpcServer(settings.listen, [DESCRIPTOR], security=settings.read_security())
    await server.start()
    tokenizer = await asyncio.to_thread(
        load_tokenizer, settings.model, settings.chat_template, settings.template_limits
    )
    logger.info("%s", describe(tokenizer.info))
    servicer = TokenizerServicer(
        tokenizer,
        settings.request_limits,
        num_threads=settings.num_threads,
        num_renderers=settings.num_template_processes,
    )
    add_to_server = tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server
    server.add(Service(DESCRIPTOR, add_to_server, servicer, background=frozenset({"Detokenize"})))
    await server.serve(shutdown, drain_timeout_seconds=settings.drain_timeout)


def describe(info: TokenizerInfo) -> str:
    template = "a chat template" if info.chat_template else "no chat template"
    ends = ", ".join(map(str, info.eos_token_ids)) or "none"
    return f"{info.model_path}: {info.kind}, {info.vocab_size} ids, end of sequence {ends}, {template}"


if __name__ == "__main__":
    settings = TokenizerSettings.from_command_line(sys.argv[1:])
    run_service(lambda shutdown: main(settings, shutdown), expected=(TokenizerLoadError,))

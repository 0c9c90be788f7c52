"""The gateway's flags and environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from gateway.quotas import Quotas
from gateway.requests import Limits
from gateway.scheduler.settings import SchedulerFlags
from protos.rpc.settings import StringList, service_config


class GatewaySettings(SchedulerFlags):
    """The door: OpenAI-compatible HTTP and the gRPC text API, over a tokenizer and any number of workers.

    Every flag may be given in the environment instead: --http-port as WINT2_GATEWAY_HTTP_PORT.
    """

    model_config = service_config("gateway", "WINT2_GATEWAY_")

    http_host: str = Field("0.0.0.0", description="address of the HTTP API")
    http_port: int = Field(8180, ge=0, le=65535, description="port of the HTTP API; 0 takes a free one")
    listen: str = Field(
        "127.0.0.1:8182",
        description='gRPC address of the text API and the scheduler: "host:port" or "unix:/path"',
    )
    http_tls_cert: Path | None = Field(
        None, description="PEM certificate (chain) of the HTTP API, which then speaks HTTPS"
    )
    http_tls_key: Path | None = Field(None, description="PEM private key of --http-tls-cert")
    workers: int = Field(
        1, ge=1, le=64, description="processes that serve the HTTP port; queues and limits are each one's own"
    )
    tokenizer: str = Field(description="address of the tokenizer service")
    scheduler: str | None = Field(
        None, description="address of a scheduler that several gateways share; default: host one here"
    )
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="a port for GET /metrics beside the HTTP API's own /metrics"
    )
    request_timeout: float = Field(600.0, gt=0, description="seconds a request may take, queueing included")
    write_timeout: float = Field(
        60.0, gt=0, description="seconds a streaming client may leave what it was sent unread"
    )
    max_body_bytes: int = Field(8 << 20, gt=0, description="largest body of an HTTP request, in bytes")
    max_choices: int = Field(128, gt=0, description="most completions of one request: prompts times n")
    max_deltas_per_second: float = Field(
        2500.0, gt=0, description="messages from workers beyond which the tokens of a stream come in bursts"
    )
    api_key: StringList = Field(
        (), repr=False, description="key that clients must send as a bearer token; may be repeated"
    )
    api_key_file: Path | None = Field(
        None, description="file with one key a line; read again whenever it changes"
    )
    max_requests_per_key: int | None = Field(
        None, gt=0, description="requests that one API key may have running; without keys: that all may have"
    )
    max_tokens_per_minute_per_key: int | None = Field(
        None, gt=0, description="tokens, prompts and completions, that one API key may use a minute"
    )
    allow_origin: StringList = Field(
        (), description='origin whose web pages may call the HTTP API ("*": any); may be repeated'
    )
    trust_request_chat_template: bool = Field(
        False, description="let requests bring a chat template of their own (rendered in a sandbox)"
    )

    def limits(self) -> Limits:
        return Limits(self.max_choices, self.trust_request_chat_template)

    def quotas(self) -> Quotas:
        return Quotas(self.max_requests_per_key, self.max_tokens_per_minute_per_key)

    @model_validator(mode="after")
    def _key_file_is_readable(self) -> Self:
        if self.api_key_file is not None and not self.api_key_file.is_file():
            raise ValueError(f"--api-key-file: no such file: {self.api_key_file}")
        return self


def share_metrics(folder: Path) -> None:
    """Makes the metrics of processes that are started from here meet in a folder."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)

"""The tokenizer service's flags and environment variables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from protos.rpc.settings import ServiceSettings, service_config
from tokenizer_svc.template_pool import TemplateLimits


@dataclass(frozen=True)
class RequestLimits:
    """What one request, or one stream, may ask for."""

    max_texts: int = 4096
    max_text_bytes: int = 16 << 20
    max_sessions: int = 4096
    max_stop_strings: int = 64
    max_stop_chars: int = 1024


class TokenizerSettings(ServiceSettings):
    """Text to token ids and back, and chat templates, for one model.

    Every flag may be given in the environment instead: --max-sessions as WINT2_TOKENIZER_MAX_SESSIONS.
    """

    model_config = service_config("tokenizer_svc", "WINT2_TOKENIZER_")

    model: Path = Field(description="folder with tokenizer.json, or tokenizer.model and the files beside it")
    listen: str = Field(
        "127.0.0.1:8190", description='gRPC address: "host:port" (port 0 takes a free one) or "unix:/path"'
    )
    chat_template: str | None = Field(
        None, description="file with a Jinja chat template, in place of the model's own"
    )
    template_timeout: float = Field(
        3.0, gt=0, description="seconds that rendering a chat template may compute"
    )
    num_template_processes: int = Field(2, ge=1, description="chat templates rendered at the same time")
    num_threads: int = Field(2, ge=1, description="requests tokenized at the same time")
    max_texts: int = Field(RequestLimits.max_texts, ge=1, description="most texts of one request")
    max_text_bytes: int = Field(
        RequestLimits.max_text_bytes, ge=1, description="most bytes of one request's texts or messages"
    )
    max_sessions: int = Field(
        RequestLimits.max_sessions, ge=1, description="most sessions open on one Detokenize stream"
    )

    @property
    def request_limits(self) -> RequestLimits:
        return RequestLimits(self.max_texts, self.max_text_bytes, self.max_sessions)

    @property
    def template_limits(self) -> TemplateLimits:
        return TemplateLimits(
            max_text_chars=self.max_text_bytes,
            cpu_seconds=self.template_timeout,
            num_processes=self.num_template_processes,
        )

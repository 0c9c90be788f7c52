"""What every service takes from flags and environment: one frozen declaration gives both, and the help."""

from __future__ import annotations

import argparse
import inspect
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    NoDecode,
    SettingsConfigDict,
    SettingsError,
)

from protos.rpc.process import fail
from protos.rpc.security import Security, read_security


def _split(value: Any) -> Any:
    return (
        tuple(item.strip() for item in value.split(",") if item.strip()) if isinstance(value, str) else value
    )


# A flag that may be repeated, and a comma-separated list in the environment.
StringList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]


def service_config(module: str, env_prefix: str) -> SettingsConfigDict:
    """The `model_config` of a service started as `python -m module`."""
    return SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=env_prefix,
        cli_prog_name=f"python -m {module}",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Says nothing of a default that is None: the description tells what happens then."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return super()._fill_text(inspect.cleandoc(text), width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (action.help or "").removesuffix(" (default: None)")


class ServiceSettings(BaseSettings):
    """Flags that every service has."""

    listen: str = Field(description='gRPC address: "host:port" (port 0 takes a free one) or "unix:/path"')
    drain_timeout: float = Field(30.0, ge=0, description="seconds that running requests get after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="one readable line an event, or one JSON object"
    )
    otlp_endpoint: str | None = Field(
        None,
        description="OpenTelemetry collector that spans are sent to (gRPC, http://host:4317); "
        "default: OTEL_EXPORTER_OTLP_ENDPOINT, without which there is no tracing",
    )
    tls_cert: Path | None = Field(
        None, description="PEM certificate of this service: its gRPC port speaks TLS; also shown to others"
    )
    tls_key: Path | None = Field(None, description="PEM private key of --tls-cert")
    tls_ca: Path | None = Field(
        None, description="PEM authority of the other services: they are called with TLS"
    )
    tls_client_auth: bool = Field(
        False, description="callers must show a certificate of --tls-ca (mutual TLS)"
    )

    @property
    def tracing_endpoint(self) -> str | None:
        """Where spans go, by flag or by OpenTelemetry's own variables."""
        names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        return self.otlp_endpoint or next((os.environ[name] for name in names if os.environ.get(name)), None)

    def read_security(self) -> Security:
        """The TLS files that the flags name. Raises StartupError."""
        return read_security(self.tls_cert, self.tls_key, self.tls_ca, is_mutual=self.tls_client_auth)

    @classmethod
    def from_command_line(cls, arguments: list[str] | None = None) -> Self:
        """Reads flags, then the environment, then defaults. Wrong values end the process with exit code 2."""
        try:
            source = CliSettingsSource[Any](cls, formatter_class=HelpFormatter)
            return CliApp.run(cls, cli_args=arguments, cli_settings_source=source)
        except ValidationError as error:
            fail("; ".join(cls._explain(item["loc"], item["msg"]) for item in error.errors()))
        except SettingsError as error:
            fail(str(error))

    @classmethod
    def _explain(cls, location: tuple[int | str, ...], message: str) -> str:
        if not location:
            return message.removeprefix("Value error, ")
        name = str(location[0])
        variable = f"{cls.model_config.get('env_prefix', '')}{name}".upper()
        return f"--{name.replace('_', '-')} (or {variable}): {message[:1].lower()}{message[1:]}"

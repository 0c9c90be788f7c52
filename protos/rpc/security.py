"""Who may talk to whom: TLS and mutual TLS, one declaration for both directions of a service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from protos.rpc.errors import StartupError


@dataclass(frozen=True, slots=True)
class Security:
    """What a service shows to others and asks of them.

    `certificate` and `key` are PEM: with them the service listens with TLS, and shows the certificate to the
    services that it calls. `authority` is the PEM of the authority that others' certificates must come from:
    with it calls are made with TLS. `is_mutual` makes callers show a certificate of that authority.
    """

    certificate: bytes | None = None
    key: bytes | None = None
    authority: bytes | None = None
    is_mutual: bool = False

    @property
    def server_credentials(self) -> grpc.ServerCredentials | None:
        if self.certificate is None or self.key is None:
            return None
        pair = (self.key, self.certificate)
        return grpc.ssl_server_credentials([pair], self.authority, require_client_auth=self.is_mutual)

    @property
    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        if self.authority is None:
            return None
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


PLAINTEXT = Security()


def read_security(
    certificate: Path | None, key: Path | None, authority: Path | None, *, is_mutual: bool
) -> Security:
    """Reads the PEM files. StartupError names the flag whose file is missing, or of no use alone."""
    if (certificate is None) != (key is None):
        raise StartupError("--tls-cert and --tls-key go together: one of them is missing")
    if is_mutual and (certificate is None or authority is None):
        raise StartupError("--tls-client-auth needs --tls-cert, --tls-key and --tls-ca")
    return Security(
        _read_pem("--tls-cert", certificate),
        _read_pem("--tls-key", key),
        _read_pem("--tls-ca", authority),
        is_mutual,
    )


def _read_pem(flag: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartupError(f"{flag}: cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    if b"-----BEGIN " not in content:
        raise StartupError(f"{flag}: {path} is not a PEM file")
    return content

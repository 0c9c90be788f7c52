"""Who may talk to whom: TLS and mutual TLS, one declaration for both directions of a service."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import grpc

from protos.rpc.errors import StartupError
from protos.rpc.renewal import Renewed


@dataclass(frozen=True, slots=True)
class Security:
    """What a service shows to others and asks of them.

    `certificate` and `key` are PEM: with them the service listens with TLS, and shows the certificate to the
    services that it calls. `authority` is the PEM of the authority that others' certificates must come from:
    with it calls are made with TLS. `is_mutual` makes callers show a certificate of that authority.
    `files` is where they came from, and where newer ones are.
    """

    certificate: bytes | None = None
    key: bytes | None = None
    authority: bytes | None = None
    is_mutual: bool = False
    files: Renewed[Security] | None = field(default=None, compare=False, repr=False)

    @property
    def latest(self) -> Security:
        """This, as the files have it now."""
        return self if self.files is None else self.files.current()

    @property
    def server_credentials(self) -> grpc.ServerCredentials | None:
        """Each new connection is met with the latest certificate."""
        if self.certificate is None:
            return None
        served = self.latest

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            before, served = served, self.latest
            return None if served is before else served._server_configuration()

        return grpc.dynamic_ssl_server_credentials(
            served._server_configuration(),
            newer,  # type: ignore[arg-type]  # None is for "no change"
            require_client_authentication=self.is_mutual,
        )

    @property
    def channel_credentials(self) -> grpc.ChannelCredentials | None:
        if self.authority is None:
            return None
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)

    def _server_configuration(self) -> grpc.ServerCertificateConfiguration:
        pairs = [(self.key or b"", self.certificate or b"")]
        return grpc.ssl_server_certificate_configuration(pairs, self.authority)


PLAINTEXT = Security()


def read_security(
    certificate: Path | None, key: Path | None, authority: Path | None, *, is_mutual: bool
) -> Security:
    """Reads the PEM files. StartupError names the flag whose file is missing, or of no use alone."""
    if (certificate is None) != (key is None):
        raise StartupError("--tls-cert and --tls-key go together: one of them is missing")
    if is_mutual and (certificate is None or authority is None):
        raise StartupError("--tls-client-auth needs --tls-cert, --tls-key and --tls-ca")
    paths = [path for path in (certificate, key, authority) if path is not None]
    files = Renewed(paths, partial(_read_files, certificate, key, authority, is_mutual))
    return replace(files.current(), files=files) if paths else PLAINTEXT


def check_pair(certificate: Path, key: Path, flag: str) -> ssl.SSLContext:
    """A server's context with them. StartupError if they are no certificate and its key."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        words = reason.lower().replace("_", " ")
        raise StartupError(f"{flag}-cert {certificate} and {flag}-key {key}: {words}") from error
    return context


def _read_files(
    certificate: Path | None, key: Path | None, authority: Path | None, is_mutual: bool
) -> Security:
    read = Security(
        _read_pem("--tls-cert", certificate),
        _read_pem("--tls-key", key),
        _read_pem("--tls-ca", authority),
        is_mutual,
    )
    if certificate is not None and key is not None:
        check_pair(certificate, key, "--tls")
    return read


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

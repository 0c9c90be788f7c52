"""Certificates made on the spot."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

SUBJECT = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
NEW = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


@dataclass(frozen=True)
class Certificates:
    """PEM files: an authority's certificate, and a certificate and key that it signed for this host."""

    authority: Path
    certificate: Path
    key: Path

    def found(self) -> None:
        """A new authority."""
        subject = ["-subj", "/CN=test authority"]
        openssl(*NEW, "-keyout", self._authority_key, "-out", self.authority, *subject)

    def sign(self) -> None:
        """A new certificate and key."""
        by = ["-CA", self.authority, "-CAkey", self._authority_key]
        openssl(*NEW, *SUBJECT, "-keyout", self.key, "-out", self.certificate, *by)

    @property
    def _authority_key(self) -> Path:
        return self.authority.with_suffix(".key")


def make_certificates(folder: Path) -> Certificates:
    made = Certificates(*(folder / name for name in ("ca.pem", "cert.pem", "cert.key")))
    made.found()
    made.sign()
    return made


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

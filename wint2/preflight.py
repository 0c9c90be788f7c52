"""What can be known to be wrong before any process starts: the model's directory, the ports, TLS files."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protos.rpc.errors import StartupError
from protos.rpc.security import Security, read_security
from wint2.errors import CommandError
from wint2.settings import ServeSettings

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
INDEX = "model.safetensors.index.json"


def check_model(path: Path, tokenizer: Path | None = None, *, needs_weights: bool = True) -> None:
    """The files that a checkpoint cannot do without; the worker looks into them. Raises CommandError."""
    if not path.exists():
        raise CommandError(
            f"--model: no directory {path} (nothing is downloaded: give the checkpoint's directory)"
        )
    if not path.is_dir():
        raise CommandError(f"--model: {path} is a file; give the directory that holds config.json")
    read_json(path / "config.json")
    if needs_weights:
        _check_weights(path)
    folder = tokenizer or path
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CommandError(f"--tokenizer: {folder} has neither {' nor '.join(TOKENIZER_FILES)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; CommandError names the file and what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CommandError(f"{path.parent} has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CommandError(f"{path}: not a JSON object")
    return value


def _check_weights(path: Path) -> None:
    if not (path / INDEX).is_file():
        if not any(path.rglob("*.safetensors")):
            raise CommandError(f"--model: {path} has no *.safetensors file")
        return
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CommandError(f'{path / INDEX}: no "weight_map"')
    missing = sorted({str(name) for name in weight_map.values() if not (path / str(name)).is_file()})
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CommandError(f"{path / INDEX} names {missing[0]}{more}, which is not there")


def check_ports(host: str, ports: dict[str, int]) -> None:
    """Each flag's port must be its own and free; CommandError names the flag, the port and its holder."""
    seen: dict[int, str] = {}
    for flag, port in ports.items():
        if port in seen:
            raise CommandError(f"{seen[port]} and {flag} are both {port}")
        if port > 65535:
            raise CommandError(f"{flag}: {port} is beyond 65535")
        seen[port] = flag
        _check_free(host, flag, port)


def _check_free(host: str, flag: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise CommandError(f"{flag}: cannot listen on {host}:{port}: {error.strerror}") from error
            holder = find_listener(port) or "another process"
            raise CommandError(
                f"{flag}: port {port} is in use by {holder}; stop it or choose another"
            ) from error


def find_listener(port: int) -> str | None:
    """The process that listens on a TCP port, as "name (pid N)"; None where that cannot be seen."""
    inodes = set(_listening_inodes(port))
    for link in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        try:
            if str(link.readlink()) in inodes:
                process = link.parent.parent
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
        except OSError:
            continue
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    """`socket:[inode]` of each listening socket, from /proc/net: columns 1 address, 3 state, 9 inode."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:] if table.is_file() else ():
            columns = line.split()
            if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                yield f"socket:[{columns[9]}]"


def check_security(settings: ServeSettings) -> Security:
    """The TLS files of the stack's services, read. Raises CommandError."""
    if settings.tls_cert is not None and settings.tls_ca is None:
        raise CommandError("--tls-cert needs --tls-ca: the services call one another")
    try:
        return read_security(
            settings.tls_cert, settings.tls_key, settings.tls_ca, is_mutual=settings.tls_client_auth
        )
    except StartupError as error:
        raise CommandError(str(error)) from error

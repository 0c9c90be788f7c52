"""What is wrong before anything starts, in the words the person reads."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from wint2.errors import CommandError
from wint2.preflight import check_model, check_ports, check_security
from wint2.settings import ServeSettings


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(CommandError) as caught:
        check_model(path, **options)
    return str(caught.value)


def test_a_whole_checkpoint_passes(model):
    check_model(model)


def test_no_such_directory():
    expected = "--model: no directory baidu/ERNIE (nothing is downloaded: give the checkpoint's directory)"
    assert refusal(Path("baidu/ERNIE")) == expected


def test_a_file_in_place_of_the_directory(model):
    path = model / "config.json"
    assert refusal(path) == f"--model: {path} is a file; give the directory that holds config.json"


def test_no_config(model):
    (model / "config.json").unlink()
    assert refusal(model) == f"{model} has no config.json"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "not a JSON object"),
    ],
)
def test_broken_config(model, text, reason):
    (model / "config.json").write_text(text)
    assert refusal(model) == f"{model / 'config.json'}: {reason}"


def test_no_weights(model):
    (model / "model.safetensors").unlink()
    assert refusal(model) == f"--model: {model} has no *.safetensors file"
    check_model(model, needs_weights=False)


def test_a_shard_of_the_index_is_missing(model):
    index = model / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "2.safetensors", "c": "3.safetensors"}})
    )
    assert refusal(model) == f"{index} names 2.safetensors and 1 more, which is not there"
    index.write_text("{}")
    assert refusal(model) == f'{index}: no "weight_map"'


def test_no_tokenizer(model, tmp_path_factory):
    other = tmp_path_factory.mktemp("tokenizer")
    assert (
        refusal(model, tokenizer=other)
        == f"--tokenizer: {other} has neither tokenizer.json nor tokenizer.model"
    )


def test_a_port_in_use_is_named_with_its_holder():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        name = Path("/proc/self/comm").read_text().strip()
        with pytest.raises(CommandError) as caught:
            check_ports("127.0.0.1", {"--port": port})
    holder = f"{name} (pid {os.getpid()})"
    assert str(caught.value) == f"--port: port {port} is in use by {holder}; stop it or choose another"


def test_two_flags_with_one_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(CommandError, match=f"--port and --grpc-port are both {port}"):
        check_ports("127.0.0.1", {"--port": port, "--grpc-port": port})


def test_an_address_of_another_machine():
    with pytest.raises(
        CommandError, match=r"^--port: cannot listen on 192\.0\.2\.1:80: Cannot assign requested address$"
    ):
        check_ports("192.0.2.1", {"--port": 80})


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"tls_cert": Path("/c"), "tls_key": Path("/k")}, "--tls-cert needs --tls-ca"),
        ({"tls_ca": Path("/absent")}, "--tls-ca: cannot read /absent: no such file"),
        ({"tls_ca": Path("/a"), "tls_client_auth": True}, "--tls-client-auth needs --tls-cert"),
    ],
)
def test_tls_files_that_are_missing(files, words):
    with pytest.raises(CommandError, match=words):
        check_security(ServeSettings(model=Path("/m"), _cli_parse_args=False, **files))

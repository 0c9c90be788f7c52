"""`python -m tokenizer_svc` as a process."""

import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from protos.rpc.channel import open_channel, wait_serving
from protos.wint2.tokenizer.v1 import tokenizer_pb2 as pb
from protos.wint2.tokenizer.v1 import tokenizer_pb2_grpc
from tokenizer_svc.tokenizer import load_tokenizer

pytestmark = pytest.mark.e2e


@contextmanager
def service(*arguments):
    command = [sys.executable, "-m", "tokenizer_svc", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ready_address(process) -> str:
    for line in process.stderr:
        if match := re.search(r"ready on (\S+)", line):
            return match[1]
    raise AssertionError("the service ended before it was ready")


async def ask(address, folder) -> None:
    async with open_channel(address) as channel:
        await wait_serving(channel, "wint2.tokenizer.v1.TokenizerService", timeout_seconds=10)
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        info = await stub.GetTokenizerInfo(pb.GetTokenizerInfoRequest())
        assert info.model_path == str(folder)
        assert (await stub.Tokenize(pb.TokenizeRequest(texts=["hello"]))).token_ids[0].ids


async def test_it_serves_and_ends(kind, folders):
    with service("--model", folders[kind], "--listen", "127.0.0.1:0") as process:
        await ask(ready_address(process), folders[kind])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


async def test_a_template_of_ones_own_with_variables_of_the_request(folders, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}|{{ mode }}|{{ '<|im_end|>' }}")
    with service(
        "--model", folders["byte_level"], "--listen", f"unix:{tmp_path}/s", "--chat-template", file
    ) as process:
        async with open_channel(ready_address(process)) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            request = pb.ApplyChatTemplateRequest()
            request.messages.add().update({"role": "user", "content": "a<|im_end|>b"})
            request.template_kwargs.update({"mode": "fast"})
            response = await stub.ApplyChatTemplate(request)
    assert response.text == "a<|im_end|>b|fast|<|im_end|>"
    tokenizer = load_tokenizer(folders["byte_level"])
    (end,) = tokenizer.encode("<|im_end|>", add_special_tokens=False, parse_special_tokens=True)
    assert list(response.token_ids.ids).count(end) == 1


async def test_it_listens_on_a_unix_socket(folders, tmp_path):
    address = f"unix:{tmp_path}/s"
    with service("--model", folders["byte_level"], "--listen", address) as process:
        assert ready_address(process) == address
        await ask(address, folders["byte_level"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "error: /nowhere: no such directory\n"),
        (
            ["--model", "{good}", "--chat-template", "/none.jinja"],
            "error: /none.jinja: no such chat template file\n",
        ),
        (["--model", "{good}", "--listen", "nonsense"], "error: cannot listen on 'nonsense'"),
        (["--model", "{good}", "--max-texts", "0"], "error: --max-texts"),
        ([], "error: --model"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(folders, arguments, message):
    arguments = [argument.format(good=folders["byte_level"]) for argument in arguments]
    listen = [] if "--listen" in arguments else ["--listen", "127.0.0.1:0"]
    command = [sys.executable, "-m", "tokenizer_svc", *arguments, *listen]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


def test_help_tells_every_flag():
    command = [sys.executable, "-m", "tokenizer_svc", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    for flag in (
        "--model",
        "--listen",
        "--chat-template",
        "--log-level",
        "--template-timeout",
        "--max-sessions",
    ):
        assert flag in text

"""`wint2 chat`, `complete`, `probe` and `version` as a person runs them, against the running stack."""

from __future__ import annotations

import subprocess

from tests.e2e.processes import BIN, plain_environment


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [BIN / "wint2", *arguments]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=60, env=plain_environment()
    )


def test_chat_answers_a_prompt_and_ends(stack, client):
    result = run("chat", "--url", stack.url, "--temperature", "0", "--max-tokens", "8", "Hello")
    messages = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)
    assert result.stdout == answer.choices[0].message.content + "\n"
    assert result.returncode == 0


def test_an_engine_in_this_process_answers_like_the_server(stack, tiny_model):
    options = ("--temperature", "0", "--max-tokens", "8")
    for command in ("chat", "complete"):
        served = run(command, "--url", stack.url, *options, "Hello")
        assert run(command, "--model", str(tiny_model), *options, "Hello").stdout == served.stdout


def test_a_conversation_remembers_until_it_is_cleared(stack, client):
    options = ("--url", stack.url, "--temperature", "0", "--max-tokens", "8")
    result = run("chat", *options, text="Hello\nHello\n/clear\nHello\n/exit\n")
    answers = result.stdout.split("> ")[1:-1]
    assert result.returncode == 0
    assert answers[0] == answers[3] != answers[1]


def test_complete_reads_standard_input(stack):
    options = ("--url", stack.url, "--temperature", "0", "--max-tokens", "8", "--echo")
    assert (
        run("complete", *options, "Once upon").stdout
        == run("complete", *options, "-", text="Once upon").stdout
    )


def test_errors_are_one_line(stack):
    assert run("chat", "--url", "http://127.0.0.1:1", "x").stderr == (
        "error: http://127.0.0.1:1/v1/: [Errno 111] Connection refused (is `wint2 serve` running?)\n"
    )
    result = run("chat", "--url", stack.url, "--model", "gpt-9", "x")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_probe(stack):
    for address in (stack.grpc_address, stack.worker_address, f"{stack.url}/health"):
        assert run("probe", address).returncode == 0
    result = run("probe", "127.0.0.1:1")
    assert result.returncode == 1
    assert result.stderr == "error: 127.0.0.1:1: the server was not ready after 2 s\n"


def test_doctor_looks_at_the_model(tiny_model, tmp_path):
    assert "ok    model          ernie4_5_moe" in run("doctor", "--model", str(tiny_model)).stdout
    result = run("doctor", "--model", str(tmp_path))
    assert result.returncode == 1
    assert result.stderr == "error: not ready: model\n"


def test_help_and_unknown_commands():
    assert "  serve" in run("--help").stdout
    assert run("version").stdout.startswith("python")
    result = run("dance")
    assert result.returncode == 2
    assert result.stderr.startswith("error: no command 'dance'; there are serve, chat")

"""FastDeploy's flags: every one it has is known here, and none is ignored in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from wint2.cli.serve import read_settings
from wint2.errors import CommandError
from wint2.fastdeploy import HARMLESS, NOTES, REFUSALS, RENAMED, RefusedFlagError, translate
from wint2.settings import ServeSettings

QUICK_START = """
--model . --port 8180 --metrics-port 8181 --engine-worker-queue-port 8182 --cache-queue-port 8183
--max-model-len 32768 --max-num-seqs 32 --load_choices default_v1 -tp 2 --kv-cache-ratio 0.75
--no-enable-prefix-caching --gpu_memory_utilization=0.8
"""
# The flags of FastDeploy 2.x: its api_server's own and its EngineArgs.
FASTDEPLOY = Path(__file__).with_name("fastdeploy_flags.txt").read_text().splitlines()


@pytest.mark.parametrize("name", FASTDEPLOY)
def test_every_flag_is_known(name):
    own = {field.replace("_", "-") for field in ServeSettings.model_fields}
    foreign = {flag for names in (*NOTES.values(), *REFUSALS.values()) for flag in names}
    assert name in own | foreign | RENAMED.keys() | {"graph-optimization-config"}


def test_no_flag_has_two_fates():
    fates = [flag for names in (*NOTES.values(), *REFUSALS.values(), (*RENAMED,)) for flag in names]
    assert len(fates) == len(set(fates))
    assert HARMLESS.keys() <= set(fates)


def test_the_command_line_of_the_quick_start_means_the_same_here():
    settings, notes = read_settings(QUICK_START.split())
    assert (settings.port, settings.metrics_port, settings.engine_worker_queue_port) == (8180, 8181, 8182)
    assert (settings.max_model_len, settings.max_num_seqs, settings.tensor_parallel_size) == (32768, 32, 2)
    assert not settings.enable_prefix_caching
    assert settings.gpu_memory_utilization == 0.8
    assert notes == [
        "--kv-cache-ratio is not needed: KV blocks are taken one by one as a sequence grows, from one pool",
        "--cache-queue-port is not needed: the KV cache has no port here",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--num-gpu-blocks-override 77", ["--num-kv-blocks", "77"]),
        ("--max-concurrency=512", ["--max-waiting", "512"]),
        ("--load-choices dummy", ["--load-format", "dummy"]),
        ("--use-cudagraph --seed -1", ["--use-cudagraph", "--seed", "-1"]),
        ("--splitwise-role mixed --runner auto --quantization wint2", []),
    ],
)
def test_renamed_and_harmless_flags(words, expected):
    assert translate(words.split()).arguments == expected
    assert not translate(words.split()).notes


@pytest.mark.parametrize(("config", "flag"), [("true", "--use-cudagraph"), ("false", "--no-use-cudagraph")])
def test_graph_optimization_config(config, flag):
    words = ["--graph-optimization-config", f'{{"use_cudagraph": {config}, "graph_opt_level": 0}}']
    assert translate(words).arguments == [flag]


def test_no_limit_keeps_the_default_and_says_so():
    translation = translate(["--max-waiting-time", "-1"])
    assert not translation.arguments
    assert translation.notes == ["--max-waiting-time -1 asks for no limit: --queue-timeout keeps its default"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--splitwise-role prefill", "--splitwise-role: prompts and answers are computed by the same worker"),
        ("--speculative-config {}", "--speculative-config: there is no speculative decoding"),
        (
            "--quantization wint4",
            "--quantization: nothing is quantized while loading: run `wint2 quantize IN OUT`",
        ),
        ("--graph-optimization-config nonsense", "--graph-optimization-config: not JSON: nonsense"),
        ("--graph-optimization-config [1]", "--graph-optimization-config: not a JSON object: [1]"),
    ],
)
def test_refused_flags_say_why(words, message):
    with pytest.raises(RefusedFlagError, match=message.replace("[", r"\[").replace("--", "")):
        translate(words.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--port 70000 --model .", "--port: input should be less than or equal to 65535"),
        (
            "--port x --model .",
            "--port: input should be a valid integer, unable to parse string as an integer",
        ),
        ("--port 1", "--model: field required"),
        ("--model . --bogus 3", "unrecognized arguments: --bogus 3"),
        (
            "--model . --device tpu",
            "--device: input should be 'auto', 'cpu' or 'cuda'",
        ),
        (
            "--model . --gpu-memory-utilization 1.5",
            "--gpu-memory-utilization: input should be less than or equal to 1",
        ),
    ],
)
def test_wrong_values_give_one_line(words, message):
    with pytest.raises(CommandError) as caught:
        read_settings(words.split())
    assert str(caught.value) == message
    assert caught.value.exit_code == 2

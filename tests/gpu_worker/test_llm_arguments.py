"""LLM takes every engine flag of FastDeploy's, or says why it does not apply."""

from pathlib import Path

import pytest
import torch

from gpu_worker.engine.errors import EngineArgsError
from gpu_worker.engine.memory import choose_cache_dtype
from gpu_worker.llm_arguments import NOTED, REFUSED, read_arguments

FLAGS = Path(__file__).parents[1] / "wint2" / "fastdeploy_flags.txt"
# Of the HTTP server, which an LLM does not have, and what LLM itself takes before the engine does.
SERVER = {
    "host",
    "port",
    "workers",
    "metrics_port",
    "controller_port",
    "max_waiting_time",
    "max_concurrency",
    "timeout",
    "timeout_graceful_shutdown",
    "enable_mm_output",
    "api_key",
    "tp",
}
OWN = {"model", "tokenizer", "chat_template"}
NAMES = {line.strip().replace("-", "_") for line in FLAGS.read_text().splitlines() if line.strip()}


@pytest.mark.parametrize("name", sorted(NAMES - SERVER - OWN))
def test_every_engine_flag_is_known(name):
    read_arguments("model", {name: None})


@pytest.mark.parametrize("name", sorted(NOTED))
def test_a_flag_without_effect_is_noted_with_its_reason(name):
    _, notes = read_arguments("model", {name: 1})
    assert notes == [f"{name} has no effect: {NOTED[name]}"]


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_flag_that_cannot_be_honoured_is_refused_with_its_reason(name):
    with pytest.raises(EngineArgsError) as caught:
        read_arguments("model", {name: "something"})
    assert REFUSED[name] in str(caught.value)


def test_vllms_name_of_a_cache_dtype():
    assert read_arguments("m", {"kv_cache_dtype": "fp8_e4m3"})[0].kv_cache_dtype == "fp8"
    with pytest.raises(EngineArgsError, match=r"must be auto or float32 .* or fp8, got 'fp4'"):
        choose_cache_dtype("fp4", torch.float32, torch.device("cpu"))
    with pytest.raises(EngineArgsError, match="int8 cannot be had on a GPU with dtype float32"):
        choose_cache_dtype("int8", torch.float32, torch.device("cuda"))

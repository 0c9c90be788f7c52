"""aiperf: a short load of streamed chats, without an error, every answer of the length that was asked for.

It has an environment of its own: its exact versions exclude those of the other clients.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

AIPERF = os.environ.get("WINT2_AIPERF", Path(__file__).parents[2] / ".venv-aiperf" / "bin" / "aiperf")
NUM_REQUESTS = 12
NUM_TOKENS = 16
# aiperf takes a tokenizer's folder for the name of a repository when these are set.
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def test_a_short_load_has_no_error_and_whole_answers(server, tmp_path):
    load = ["--concurrency", "4", "--request-count", str(NUM_REQUESTS), "--random-seed", "1"]
    tokens = ["--synthetic-input-tokens-mean", "32", "--output-tokens-mean", str(NUM_TOKENS)]
    extra = ["--extra-inputs", "ignore_eos:true", "--extra-inputs", f"min_tokens:{NUM_TOKENS}"]
    about = ["--model", "tiny", "--tokenizer", str(server.model), "--use-server-token-count"]
    kind = ["--endpoint-type", "chat", "--streaming", "--ui-type", "none", "--artifact-dir", str(tmp_path)]
    command = [str(AIPERF), "profile", "--url", server.url, *about, *kind, *load, *tokens, *extra]
    env = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-6000:]

    report = json.loads((tmp_path / "profile_export_aiperf.json").read_text())
    assert not report["error_summary"]
    assert report["request_count"]["avg"] == NUM_REQUESTS
    lengths = report["output_sequence_length"]
    assert lengths["min"] == lengths["max"] == NUM_TOKENS
    assert report["time_to_first_token"]["p50"] > 0

    scraped = json.loads((tmp_path / "server_metrics_export.json").read_text())
    assert "wint2_gateway_time_to_first_token_seconds" in json.dumps(scraped)

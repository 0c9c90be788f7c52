"""A load needs little memory beside the model's own: about a layer, however large the checkpoint."""

import subprocess
import sys
from pathlib import Path

from tests.tiny import make_tiny_model

SIZES = {
    "hidden_size": 256,
    "num_hidden_layers": 12,
    "moe_num_experts": 16,
    "moe_intermediate_size": 1024,
    "moe_layer_end_index": 11,
}
MIB = 2**20
# Prints the bytes of anonymous memory before the load, at most during it, and of the weights held after it.
SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
from cuda_kernels.compiled import compile_kernels
from gpu_worker.engine.memory import _proc_bytes
from gpu_worker.model.config_reader import read_model_config
from gpu_worker.model.loader import load_model

def used():
    return _proc_bytes(Path("/proc/self/status"), "RssAnon:")

compile_kernels()
before, seen, is_over = used(), [], threading.Event()

def watch():
    while not is_over.wait(0.002):
        seen.append(used())

thread = threading.Thread(target=watch)
thread.start()
decoder = load_model(read_model_config(Path(sys.argv[1])), device=torch.device("cpu"), dtype=torch.float32)
is_over.set()
thread.join()
print(before, max(seen), sum(decoder.memory.device_bytes.values()))
"""


def test_a_load_takes_little_beside_the_weights(tmp_path):
    model = make_tiny_model(tmp_path, quantized=False, **SIZES)
    stored = (model / "model.safetensors").stat().st_size
    assert stored > 280 * MIB
    command = [sys.executable, "-c", SCRIPT, str(model)]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=root)
    assert result.returncode == 0, result.stderr
    before, peak, held = map(int, result.stdout.split())
    assert held > 0.9 * stored
    assert peak - before - held < 48 * MIB

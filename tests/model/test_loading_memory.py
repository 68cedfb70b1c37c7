"""The memory that loading takes is the model's own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.conftest import tiny_config

from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.model.weights import save_weights

# The high-water mark of this process's own memory: getrusage's would begin with that of the process that started it.
LOAD = """
import sys, torch
from pathlib import Path
from qwen3_next import Qwen3NextForCausalLM

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

before = peak()
model = Qwen3NextForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
size = sum(parameter.nbytes for parameter in model.parameters())
print((peak() - before) / size, size / 2**20)
"""


FILL = """
import sys, torch
from pathlib import Path
from qwen3_next.engine.loading import read_config
from qwen3_next.model.bare import BareCausalLM

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

folder = Path(sys.argv[1])
config, to = read_config(folder), (torch.bfloat16, torch.device("cpu"))
before = peak()
if sys.argv[2] == "read":
    model = BareCausalLM.from_directory(folder, config, *to, quantization="fp8")
else:
    model = BareCausalLM.with_random_values(config, *to, quantization="fp8")
size = sum(parameter.nbytes for parameter in model.parameters())
print((peak() - before) / size, size / 2**20)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred MB in bf16, nearly all of them experts, as published."""
    config = tiny_config(
        vocab_size=8000, hidden_size=512, num_experts=96, moe_intermediate_size=256, dtype=torch.bfloat16
    )
    config.architectures = ["Qwen3NextForCausalLM"]
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("checkpoint")
    config.save_pretrained(folder)
    save_weights(
        model.state_dict(), folder, fetch=lambda name: torch.zeros_like(model.get_parameter(name), device="cpu")
    )
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark from Linux")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_host_memory_while_loading_is_under_one_and_a_fifth_of_the_model(checkpoint: Path, dtype: str) -> None:
    command = [sys.executable, "-c", LOAD, str(checkpoint), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ratio, megabytes = json.loads(f"[{done.stdout.strip().replace(' ', ',')}]")
    assert megabytes > 300
    assert ratio < 1.2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the high-water mark from Linux")
@pytest.mark.parametrize("source", ["read", "drawn"])
def test_weights_that_become_fp8_never_exist_in_bf16(checkpoint: Path, source: str) -> None:
    """In bf16 alone they would be nearly twice the size of the model in fp8."""
    command = [sys.executable, "-c", FILL, str(checkpoint), source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ratio, megabytes = json.loads(f"[{done.stdout.strip().replace(' ', ',')}]")
    assert megabytes > 150
    assert ratio < 1.5

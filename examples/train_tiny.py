"""Train a tiny model of its own on a few documents: python examples/train_tiny.py [tokenizer]"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import qwen3_next
from qwen3_next.train import TrainConfig, train

SETTINGS = """
schedule = {steps = 12, warmup_steps = 2}
optimizer = {lr = 1e-2}
data = {train = ["documents.jsonl"], tokenizer = "TOKENIZER", sequence_length = 64, tokens_per_batch = 256}
run = {output = "run", device = "cpu", dtype = "float32", log_every = 4}

[model.config]
vocab_size = 4096
hidden_size = 32
num_hidden_layers = 4
num_attention_heads = 2
num_key_value_heads = 1
linear_num_key_heads = 1
linear_num_value_heads = 2
num_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 16
shared_expert_intermediate_size = 32
"""

tokenizer = sys.argv[1] if len(sys.argv) > 1 else f"{qwen3_next.__path__[0]}/assets"
with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
    rows = [{"text": f"Ship number {n} has {n + 1} lamps and sails at dawn."} for n in range(50)]
    Path("documents.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Path("train.toml").write_text(SETTINGS.replace("TOKENIZER", tokenizer), encoding="utf-8")
    result = train(TrainConfig.from_toml("train.toml"))  # the same call again goes on after an interruption
    model = qwen3_next.Qwen3NextForCausalLM.from_pretrained(result.model)
    print(f"{result.step} steps, {result.tokens} tokens, {model.num_parameters():,} parameters")

"""LoRA on every projection, merged into the weights at the end: python examples/fine_tune_lora.py [model]"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import qwen3_next

LINES = ["The lighthouse keeper counts ships.", "Every ship has a lamp.", "Every lamp has a keeper."]
MIXERS = ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # all of a layer's in one parameter each
SHARED_EXPERT = [f"shared_expert.{name}_proj.weight" for name in ("gate", "up", "down")]

torch.manual_seed(0)
name = sys.argv[1] if len(sys.argv) > 1 else f"{qwen3_next.__path__[0]}/assets"
tokenizer = AutoTokenizer.from_pretrained(name)
model = qwen3_next.Qwen3NextForCausalLM.from_pretrained(name, dtype=torch.float32)
lora = LoraConfig(r=4, lora_alpha=8, target_modules=MIXERS, target_parameters=EXPERTS + SHARED_EXPERT)
adapted = get_peft_model(model, lora)
adapted.print_trainable_parameters()

batch = tokenizer(LINES, return_tensors="pt", padding=True)
labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
for step in range(6):
    loss = adapted(**batch, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")

adapted.eval()
with torch.no_grad():
    before = adapted(**batch).logits
    merged = adapted.merge_and_unload()  # an ordinary model again: save_pretrained writes the published layout
    difference = (merged(**batch).logits - before).abs().max() / before.abs().max()
print(f"merged: largest relative difference {difference:.1e}")

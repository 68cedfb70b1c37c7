"""Teach a classification head on the network to tell code from prose: python examples/classify.py [model]"""

import sys

import torch
from transformers import AutoTokenizer

import qwen3_next

TEXTS = {
    "prose": ["The sea was calm.", "She had never seen snow.", "They walked home in silence.", "It was late."],
    "code": ["def f(x): return x", "for i in range(3):", "import os", "x = [1, 2, 3]"],
}
labels = dict(enumerate(TEXTS))

torch.manual_seed(0)
name = sys.argv[1] if len(sys.argv) > 1 else f"{qwen3_next.__path__[0]}/assets"
tokenizer = AutoTokenizer.from_pretrained(name)
model = qwen3_next.Qwen3NextForSequenceClassification.from_pretrained(name, dtype=torch.float32, id2label=labels)

batch = tokenizer([text for texts in TEXTS.values() for text in texts], return_tensors="pt", padding=True)
targets = torch.arange(len(TEXTS)).repeat_interleave(4)
model.model.requires_grad_(False)  # the network stays as it is; only the new head learns
optimizer = torch.optim.AdamW(model.score.parameters(), lr=0.002)
for step in range(12):
    loss = model(**batch, labels=targets).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 4 == 3:
        print(f"step {step + 1}: loss {loss.item():.3f}")

for text in ["He closed the door.", "while True: pass"]:
    with torch.no_grad():
        scores = model(**tokenizer(text, return_tensors="pt")).logits[0]
    print(f"{labels[int(scores.argmax())]:6} {text}")

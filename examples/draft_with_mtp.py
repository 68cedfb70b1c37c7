"""Greedy decoding in which the multi-token prediction layer drafts: python examples/draft_with_mtp.py [model]"""

import copy
import sys

import torch
from transformers import AutoTokenizer

import qwen3_next

NEW = 48
name = sys.argv[1] if len(sys.argv) > 1 else f"{qwen3_next.__path__[0]}/assets"
tokenizer = AutoTokenizer.from_pretrained(name)
model = qwen3_next.Qwen3NextForCausalLM.from_pretrained(name, dtype=torch.float32).requires_grad_(False)
prompt = tokenizer("Once upon a time, in a small village by the sea,", return_tensors="pt").input_ids

# Read the prompt; the layer drafts from the states of the model and the token that follows each of them.
out = model(prompt, use_cache=True, output_hidden_states=True)
newest = out.logits[:, -1:].argmax(-1)
drafts = model.draft(out.hidden_states[-1], torch.cat([prompt[:, 1:], newest], dim=1))
written, cache, tried, accepted = newest, out.past_key_values, 0, 0
while written.shape[1] < NEW:
    before = copy.deepcopy(cache)  # the state of a Gated DeltaNet layer cannot be rolled back
    out = model(torch.cat([newest, drafts.token_ids], 1), past_key_values=cache, output_hidden_states=True)
    chosen = out.logits.argmax(-1)  # what follows the newest token, and what follows the draft if it was right
    tried += 1
    if chosen[0, 0] == drafts.token_ids[0, 0]:
        accepted += 1
    else:
        cache = before
        out = model(newest, past_key_values=cache, output_hidden_states=True)
        chosen = chosen[:, :1]
    drafts = model.draft(out.hidden_states[-1], chosen, past_key_values=drafts.past_key_values)
    written, newest = torch.cat([written, chosen], dim=1), chosen[:, -1:]

model.generation_config.eos_token_id = None  # the loop above does not stop there either
plain = model.generate(prompt, do_sample=False, repetition_penalty=1.0, max_new_tokens=NEW)
assert plain[0, prompt.shape[1] :].tolist() == written[0, :NEW].tolist(), "drafting must not change the text"
print(tokenizer.decode(written[0, :NEW]))
print(f"{accepted} of {tried} drafts accepted: {written.shape[1] / (tried + 1):.2f} tokens per call of the model")

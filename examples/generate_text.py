"""The published usage of the model, with one line added: python examples/generate_text.py [model]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import qwen3_next

qwen3_next.register()  # the line: the Auto classes now return this package's classes

model_name = sys.argv[1] if len(sys.argv) > 1 else f"{qwen3_next.__path__[0]}/assets"

# load the tokenizer and the model
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name, dtype="auto", device_map="auto")

# prepare the model input
messages = [{"role": "user", "content": "Give me a short introduction to large language models."}]
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
model_inputs = tokenizer([text], return_tensors="pt").to(model.device)

# conduct text completion
generated_ids = model.generate(**model_inputs, max_new_tokens=48)
output_ids = generated_ids[0][len(model_inputs.input_ids[0]) :].tolist()
content = tokenizer.decode(output_ids, skip_special_tokens=True)

print("content:", content)

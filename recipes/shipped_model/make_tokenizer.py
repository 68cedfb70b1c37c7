"""Train the shipped model's tokenizer: a byte-level BPE of 4096 entries in Qwen's format.

python recipes/shipped_model/make_tokenizer.py DATA src/qwen3_next/assets
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from corpus import END_OF_TEXT, TURN_END, TURN_START, rows
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tqdm import tqdm

VOCABULARY = 4096
CONTEXT = 2048
CONTROL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
PIECE = 20_000  # characters handed to the trainer at a time

# The pre-tokeniser of Qwen's tokenizers: contractions, words, single digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen's protocol: the system turn (with the tools) first, then the turns in order; tool results that follow
# one another share one user turn.
CHAT_TEMPLATE = r"""
{%- set first_is_system = messages and messages[0].role == 'system' %}
{%- if tools or first_is_system %}
    {{- '<|im_start|>system\n' }}
    {%- if first_is_system and messages[0].content is string %}
        {{- messages[0].content }}
        {%- if tools and messages[0].content %}{{- '\n\n' }}{%- endif %}
    {%- endif %}
    {%- if tools %}
        {{- '# Tools\n\nThese functions may be called to help the user. Each line is one JSON signature:\n<tools>' }}
        {%- for tool in tools %}{{- '\n' ~ (tool | tojson) }}{%- endfor %}
        {{- '\n</tools>\n\nTo call a function, write its name and arguments as JSON between these tags:\n' }}
        {{- '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set text = message.content if message.content is string else '' %}
    {%- if message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' ~ text ~ '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- elif not (loop.first and first_is_system) %}
        {{- '<|im_start|>' ~ message.role ~ '\n' ~ text }}
        {%- if message.role == 'assistant' and message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- set function = call.function if call.function else call %}
                {%- set arguments = function.arguments %}
                {{- '\n' if text or not loop.first else '' }}
                {{- '<tool_call>\n{"name": "' ~ function.name ~ '", "arguments": ' }}
                {{- arguments if arguments is string else arguments | tojson }}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
""".strip()


def samples(data: Path) -> Iterator[str]:
    """Yield the text the merges are learned from: about 18 MB of code, 16 MB of prose, 2 MB of chats."""
    for part, limit in (("code.train-00*", 18_000_000), ("prose.train-00*", 16_000_000), ("dialog.train*", 2_000_000)):
        used = 0
        for row in rows(data, part):
            texts = [row["text"]] if "text" in row else [turn["content"] for turn in row["messages"]]
            # One long source file or book must not decide the merges.
            pieces = [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]
            for piece in pieces[:1] if part.startswith("code") else pieces:
                used += len(piece)
                yield piece
            if used > limit:
                break


def train(data: Path) -> Tokenizer:
    """Learn the merges and append the added tokens, so that their ids are the last ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL_TOKENS) - len(MARKUP_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=True,
    )
    tokenizer.train_from_iterator(tqdm(samples(data), desc="reading", unit=" pieces"), trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in MARKUP_TOKENS])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(
            f"the vocabulary has {tokenizer.get_vocab_size()} entries instead of {VOCABULARY}: more text is needed."
        )
    return tokenizer


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, object]:
    """The tokenizer_config.json that makes AutoTokenizer read the tokenizer as Qwen's."""
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in CONTROL_TOKENS,
        }
        for token in CONTROL_TOKENS + MARKUP_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [TURN_START, TURN_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": CONTEXT,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def main() -> None:
    """Train the tokenizer and write tokenizer.json and tokenizer_config.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="folder with the .jsonl.zst files")
    parser.add_argument("output", type=Path, help="folder to write, e.g. src/qwen3_next/assets")
    arguments = parser.parse_args()
    tokenizer = train(arguments.data)
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.output / "tokenizer.json"))
    config = json.dumps(tokenizer_config(tokenizer), indent=2, ensure_ascii=False) + "\n"
    (arguments.output / "tokenizer_config.json").write_text(config, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Choose the 100 fixed held-out prompts of each kind from the packed validation folders.

python recipes/shipped_model/prompts.py runs/shipped src/qwen3_next/assets recipes/shipped_model/prompts.json
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from selection import parsed, top_line
from tokenizers import Tokenizer
from tqdm import tqdm

SEED = 7
COUNT = 100
PROSE_TOKENS = 64
CODE_TOKENS = (40, 200)


def load(folder: Path) -> list[NDArray[np.uint16]]:
    """The documents of a packed folder, the end token of each included."""
    tokens = np.fromfile(folder / "tokens.bin", "<u2")
    return np.split(tokens, np.fromfile(folder / "documents.bin", "<i8")[1:-1])


def prose_prompt(text: str, tokenizer: Tokenizer, rng: random.Random) -> str | None:
    """About 64 tokens from a random paragraph's beginning, cut before a word."""
    starts = [0, *(i + 2 for i in range(len(text)) if text.startswith("\n\n", i))]
    text = text[rng.choice(starts) :]
    encoding = tokenizer.encode(text)
    if len(encoding.ids) < 2 * PROSE_TOKENS:
        return None
    cut = max(i for i in range(PROSE_TOKENS + 1) if encoding.tokens[i].startswith("Ġ"))
    return text[: encoding.offsets[cut - 1][1]]


def code_prompt(text: str, tokenizer: Tokenizer, _rng: random.Random) -> str | None:
    """A file's first top-level statements, with the `def` line of the next one where that fits."""
    tree = parsed(text)
    # Documents are pieces of files; one that imports at its top is the beginning of a file.
    if tree is None or not any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body[:2]):
        return None
    lines = text.split("\n")
    ends = [top_line(node) for node in tree.body[1:]]
    headers = [
        node.body[0].lineno - 1
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and lines[node.body[0].lineno - 2].endswith(":")
    ]
    # What follows a whole statement starts at the margin, behind the blank lines that belong to the prompt.
    for group in (headers, ends):
        prompts = ["\n".join(lines[:end]) + "\n" for end in group]
        fitting = [p for p in prompts if CODE_TOKENS[0] <= len(tokenizer.encode(p).ids) <= CODE_TOKENS[1]]
        if fitting:
            return fitting[-1]
    return None


def choose(
    folder: Path, tokenizer: Tokenizer, make: Callable[[str, Tokenizer, random.Random], str | None]
) -> list[dict[str, str | int]]:
    """Take prompts from the documents in a seeded order, going round until there are enough different ones."""
    documents = load(folder)
    rng = random.Random(SEED)
    order = rng.sample(range(len(documents)), len(documents))
    chosen: dict[str, int] = {}
    with tqdm(total=COUNT, desc=folder.name, unit=" prompts") as bar:
        for index in order * 20:
            text = tokenizer.decode(documents[index][:-1].tolist(), skip_special_tokens=False)
            prompt = make(text, tokenizer, rng)
            if prompt and prompt not in chosen:
                chosen[prompt] = index
                bar.update()
            if len(chosen) == COUNT:
                return [{"document": index, "text": prompt} for prompt, index in chosen.items()]
    raise ValueError(f"{folder} yields only {len(chosen)} different prompts of {COUNT}; give more validation text.")


def main() -> None:
    """Write prompts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packed", type=Path, help="folder that holds val_prose and val_code")
    parser.add_argument("assets", type=Path, help="folder with tokenizer.json")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.assets / "tokenizer.json"))
    prompts = {
        "prose": choose(arguments.packed / "val_prose", tokenizer, prose_prompt),
        "code": choose(arguments.packed / "val_code", tokenizer, code_prompt),
    }
    arguments.output.write_text(json.dumps(prompts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

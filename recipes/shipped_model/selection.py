"""Which documents the shipped model is trained on, and how their text is prepared. The rules are the data card."""

import ast
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

RULE = (
    "code: Python files that parse, ASCII, 500 to 12,000 bytes, no line over 110 characters, indented by four spaces, "
    "no literal of more than 40 elements, cut between top-level statements; "
    "prose: hard-wrapped lines joined, cut between paragraphs, tables and indexes left out; books in the order of the "
    "files; kids, dialog and math: all"
)
MAX_CHARACTERS = 5600
"""About 1,700 tokens: a piece fits into the model's training context."""


def rows(data: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """Rows of the matching .jsonl.zst files."""
    for path in sorted(data.glob(pattern)):
        with path.open("rb") as handle:
            stream = zstandard.ZstdDecompressor().stream_reader(handle)
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                yield json.loads(line)


def code_pieces(text: str) -> list[str]:
    """The file in pieces that begin and end between top-level statements; empty where the rule leaves it out."""
    if not 500 <= len(text) <= 12_000 or not text.isascii() or "\t" in text or "\r" in text:
        return []
    if max(map(len, text.split("\n"))) > 110:
        return []
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    if any(len(getattr(node, "elts", getattr(node, "keys", ()))) > 40 for node in ast.walk(tree)):
        return []
    lines = text.split("\n")
    starts = [0, *(_first_line(node) for node in tree.body[1:])]
    blocks = ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return [piece.strip("\n") + "\n" for piece in _gather(blocks, "\n")]


def _first_line(node: ast.stmt) -> int:
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(d.lineno for d in decorators)]) - 1


def _gather(blocks: list[str], gap: str) -> list[str]:
    """Join blocks up to the maximal size."""
    pieces = [""]
    for block in blocks:
        if pieces[-1] and len(pieces[-1]) + len(block) > MAX_CHARACTERS:
            pieces.append(block)
        else:
            pieces[-1] = f"{pieces[-1]}{gap}{block}" if pieces[-1] else block
    return [piece for piece in pieces if piece.strip()]


def prose_pieces(text: str) -> list[str]:
    """The book in pieces of whole paragraphs."""
    paragraphs = [_joined(p) for p in re.split(r"\n\s*\n", text.replace("\r\n", "\n"))]
    return _gather([p for p in paragraphs if _is_prose(p)], "\n\n")


def _joined(paragraph: str) -> str:
    lines = [line.strip() for line in paragraph.strip().split("\n")]
    is_verse = len(lines) > 1 and max(map(len, lines)) < 50
    return ("\n" if is_verse else " ").join(lines)


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return bool(paragraph) and letters > 0.85 * len(paragraph) and "[" not in paragraph and "_" * 3 not in paragraph

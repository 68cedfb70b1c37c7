"""Read the rows of the training text: JSON lines, compressed with zstd."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"


def rows(data: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of every file of `data` whose name matches `pattern`, in file-name order."""
    files = sorted(data.glob(pattern))
    if not files:
        raise FileNotFoundError(
            f"{data} holds no file named {pattern}; give the folder that holds the .jsonl.zst files."
        )
    for file in files:
        with file.open("rb") as compressed:
            stream = zstandard.ZstdDecompressor().stream_reader(compressed)
            for line in io.TextIOWrapper(stream, encoding="utf-8"):
                yield json.loads(line)


def transcript(messages: list[dict[str, str]]) -> str:
    """Render a chat as the shipped chat template does for messages without tools."""
    return "".join(f"{TURN_START}{turn['role']}\n{turn['content']}{TURN_END}\n" for turn in messages)

"""Tokenised documents on disk: opened, checked, and made from JSON lines."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen3_next.errors import DataError

TOKENS, DOCUMENTS, META = "tokens.bin", "documents.bin", "meta.json"
_BATCH = 256


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The documents of one tokenised directory, mapped and not read into memory.

    Attributes:
        path: the directory.
        tokens: all documents, one after the other.
        starts: `[documents + 1]` where each begins in `tokens`.
        bytes: UTF-8 bytes of the text behind the tokens; 0 where unknown.
    """

    path: Path
    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    bytes: int

    @classmethod
    def open(cls, path: Path, vocab_size: int) -> "TokenStore":
        """Map a tokenised directory and check it.

        Raises:
            DataError: a file is missing, damaged or does not fit the others; a token is not in the vocabulary.
        """
        meta = _read_meta(path / META)
        tokens, starts = _map(path / TOKENS, str(meta["dtype"])), _map(path / DOCUMENTS, "int64")
        if starts.size < 2 or starts[0] != 0 or starts[-1] != tokens.size or bool((np.diff(starts) < 1).any()):
            raise DataError(
                f"{path / DOCUMENTS}: the starts of documents must rise from 0 to the {tokens.size} tokens of {TOKENS}; "
                "one of the two files is truncated or from another run. Tokenise again."
            )
        highest = int(tokens.max())
        if highest >= vocab_size:
            raise DataError(f"{path / TOKENS}: token id {highest} is not below the model's vocab_size {vocab_size}.")
        return cls(path, tokens, starts, int(meta.get("bytes", 0)))

    def verify(self) -> None:
        """Compare the files with the checksums noted beside them.

        Raises:
            DataError: a file is not the one that was written.
        """
        for name, expected in _read_meta(self.path / META).get("sha256", {}).items():
            found = _sha256(self.path / name)
            if found != expected:
                raise DataError(
                    f"{self.path / name}: checksum {found[:12]}... instead of {expected[:12]}...; copy it again."
                )

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self.starts.size - 1

    def document(self, index: int) -> NDArray[Any]:
        """The tokens of one document."""
        return self.tokens[self.starts[index] : self.starts[index + 1]]


def tokenize_files(
    files: Sequence[Path], tokenizer: Any, target: Path, progress: Callable[[int], None] | None = None
) -> None:
    """Turn JSON lines into a tokenised directory, each document ended by the tokenizer's padding/end-of-text token.

    Args:
        files: JSON-lines files; a row has `text`, or `messages` for the chat template. `.zst` is decompressed.
        tokenizer: a transformers tokenizer.
        target: the directory; it appears only when everything has been written.
        progress: called with the number of rows done.

    Raises:
        DataError: names the file, the row and what is wrong with it.
    """
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    end = tokenizer.eos_token_id if end is None or end == tokenizer.unk_token_id else end
    dtype = np.uint16 if len(tokenizer) <= 65536 else np.uint32
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    lengths: list[int] = []
    size = 0
    with (partial / TOKENS).open("wb") as out:
        for texts in _batches(_documents(files, tokenizer)):
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                np.asarray([*ids, end], dtype=dtype).tofile(out)
                lengths.append(len(ids) + 1)
            size += sum(len(text.encode()) for text in texts)
            if progress is not None:
                progress(len(lengths))
    if not lengths:
        raise DataError(f"{', '.join(map(str, files))}: no document in it; nothing to train on.")
    np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64).tofile(partial / DOCUMENTS)
    meta = {"dtype": np.dtype(dtype).name, "tokens": sum(lengths), "documents": len(lengths), "bytes": size}
    meta |= {"eos_token_id": end, "sha256": {name: _sha256(partial / name) for name in (TOKENS, DOCUMENTS)}}
    (partial / META).write_text(json.dumps(meta, indent=2), encoding="utf-8")
    partial.replace(target)


def _documents(files: Sequence[Path], tokenizer: Any) -> Iterator[str]:
    for file in files:
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                yield _text_of(line, f"{file}, row {number}", tokenizer)


def _text_of(line: bytes, where: str, tokenizer: Any) -> str:
    try:
        row = json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{where}: not a JSON object in UTF-8 ({error}).") from error
    if isinstance(row, dict) and isinstance(row.get("text"), str) and row["text"]:
        return row["text"]
    if isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]:
        return _render(row["messages"], where, tokenizer)
    raise DataError(f"{where}: needs a non-empty `text` string or a `messages` list.")


def _render(messages: list[Any], where: str, tokenizer: Any) -> str:
    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            raise DataError(f"{where}: every message needs a `role` and a `content`.")
    return tokenizer.apply_chat_template(messages, tokenize=False)


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as raw:
            if file.suffix != ".zst":
                yield from raw
                return
            import zstandard  # here, because only compressed data needs it

            yield from io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw))
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {file}: {error}.") from error


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}. Is this a tokenised directory?") from error
    if meta.get("dtype") not in ("uint16", "uint32"):
        raise DataError(f"{path}: dtype={meta.get('dtype')!r}; only uint16 and uint32 are read.")
    return meta


def _map(path: Path, dtype: str) -> NDArray[Any]:
    little_endian = np.dtype(dtype).newbyteorder("<")
    try:
        if path.stat().st_size % little_endian.itemsize:
            raise DataError(f"{path}: its size is no multiple of {little_endian.itemsize} bytes; it is truncated.")
        return np.memmap(path, dtype=little_endian, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

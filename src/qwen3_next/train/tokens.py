"""Tokenised documents on disk: opened, checked, and made from JSON lines."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from qwen3_next.errors import DataError, StorageError
from qwen3_next.train.storage import is_full

TOKENS, DOCUMENTS, META = "tokens.bin", "documents.bin", "meta.json"
_BATCH = 256
_READ_BYTES = 2**20


@dataclass(frozen=True, eq=False)
class TokenStore:
    """The documents of one tokenised directory, mapped and not read into memory.

    Attributes:
        path: the directory.
        tokens: all documents, one after the other.
        starts: `[documents + 1]` where each begins in `tokens`.
        bytes: UTF-8 bytes of the text behind the tokens; 0 where unknown.
        checksum: of tokens and starts: two stores with the same one hold the same documents in the same order.
    """

    path: Path
    tokens: NDArray[Any]
    starts: NDArray[np.int64]
    bytes: int
    checksum: str

    @classmethod
    def open(cls, path: Path, vocab_size: int) -> "TokenStore":
        """Map a tokenised directory and check it, against its checksums too.

        Raises:
            DataError: a file is missing, damaged or does not fit the others; a token is not in the vocabulary.
        """
        meta = _read_meta(path / META)
        tokens, starts = _map(path / TOKENS, str(meta["dtype"])), _map(path / DOCUMENTS, "int64")
        if starts.size < 2 or starts[0] != 0 or starts[-1] != tokens.size or bool((np.diff(starts) < 1).any()):
            raise DataError(
                f"{path / DOCUMENTS}: the starts of documents must rise from 0 to the {tokens.size} tokens of "
                f"{TOKENS}; one of the two files is truncated or from another run. Tokenise again."
            )
        checksum = _verified(path, meta.get("sha256", {}))
        highest = int(tokens.max())
        if highest >= vocab_size:
            raise DataError(
                f"{path / TOKENS}: token id {highest} is not below the model's vocab_size {vocab_size}; tokenise with "
                "the model's own tokenizer."
            )
        return cls(path, tokens, starts, meta.get("bytes", 0), checksum)

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
    """Turn JSON lines into a tokenised directory, each document ended by `<|endoftext|>` (or else the end token).

    Args:
        files: JSON-lines files; a row has `text`, or `messages` (and `tools`) for the chat template. `.zst` is
            decompressed.
        tokenizer: a transformers tokenizer.
        target: the directory; it appears only when everything has been written.
        progress: called with the number of rows done.

    Raises:
        DataError: names the file, the row and what is wrong with it.
        StorageError: the directory cannot be written.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(files, tokenizer, partial, progress)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
    except OSError as error:
        remedy = "Free some space." if is_full(error) else "Make its directory writable."
        raise StorageError(f"cannot write the tokenised documents {target}: {error}. {remedy}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(files: Sequence[Path], tokenizer: Any, partial: Path, progress: Callable[[int], None] | None) -> None:
    end = _end_of_document(tokenizer)
    dtype = np.dtype("<u2" if len(tokenizer) <= 65536 else "<u4")
    lengths: list[int] = []
    size = 0
    with (partial / TOKENS).open("wb") as out:
        for texts in _batches(_documents(files, tokenizer)):
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                out.write(np.asarray([*ids, end], dtype=dtype).tobytes())
                lengths.append(len(ids) + 1)
            size += sum(len(text.encode()) for text in texts)
            if progress is not None:
                progress(len(lengths))
    (partial / DOCUMENTS).write_bytes(np.cumsum([0, *lengths]).astype("<i8").tobytes())
    meta = {"dtype": dtype.name, "tokens": sum(lengths), "documents": len(lengths), "bytes": size}
    meta |= {"eos_token_id": end, "sha256": {name: _sha256(partial / name) for name in (TOKENS, DOCUMENTS)}}
    (partial / META).write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _end_of_document(tokenizer: Any) -> int:
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    end = tokenizer.eos_token_id if end is None or end == tokenizer.unk_token_id else end
    if end is None:
        raise DataError("the tokenizer has neither <|endoftext|> nor an eos_token, so nothing can end a document.")
    return end


def _documents(files: Sequence[Path], tokenizer: Any) -> Iterator[str]:
    for file in files:
        is_empty = True
        for number, line in enumerate(_lines(file), start=1):
            if line.strip():
                is_empty = False
                yield _text_of(line, f"{file}, row {number}", tokenizer)
        if is_empty:
            raise DataError(f"{file}: no document in it; remove it from the configuration or fill it.")


def _text_of(line: bytes, where: str, tokenizer: Any) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object in UTF-8 ({error}).") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {type(row).__name__} instead of a JSON object.")
    fields = cast("dict[str, Any]", row)
    text, messages = fields.get("text"), fields.get("messages")
    if isinstance(messages, list) and messages and text is None:
        text = _render(cast("list[Any]", messages), fields.get("tools"), where, tokenizer)
    if not isinstance(text, str) or not text:
        raise DataError(f"{where}: needs a non-empty `text` string or a `messages` list.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair, which no UTF-8 text can hold ({error}).") from error
    return text


def _render(messages: list[Any], tools: Any, where: str, tokenizer: Any) -> str:
    for message in messages:
        fields = cast("dict[str, Any]", message) if isinstance(message, dict) else {}
        if not isinstance(fields.get("role"), str) or "content" not in fields:
            raise DataError(f"{where}: every message needs a `role` and a `content`.")
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except Exception as error:  # whatever a template chokes on
        raise DataError(f"{where}: the tokenizer's chat template cannot render it ({error}).") from error


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as raw:
            yield from _lines_of_zstd(raw) if file.suffix == ".zst" else raw
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {file}: {error}.") from error


def _lines_of_zstd(raw: BinaryIO) -> Iterator[bytes]:
    rest = b""
    for piece in _decompressed(raw):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _decompressed(raw: BinaryIO) -> Iterator[bytes]:
    """All frames of a file; unlike the library's own reader, this one notices where the last of them is cut off."""
    import zstandard  # here, because only compressed data needs it

    frame = None
    while data := raw.read(_READ_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise OSError(f"its compressed data is damaged, {error}") from error
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("its compressed data ends too early; copy it again")


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
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}. Is this a tokenised directory?") from error
    found = cast("dict[str, Any]", meta) if isinstance(meta, dict) else {}
    dtype, size, checksums = found.get("dtype"), found.get("bytes", 0), found.get("sha256", {})
    if dtype not in ("uint16", "uint32"):
        raise DataError(f"{path}: dtype={dtype!r}; only uint16 and uint32 are read.")
    if type(size) is not int or size < 0:
        raise DataError(f"{path}: bytes={size!r}; write the bytes of the text, 0 or more, or leave it out.")
    noted = cast("dict[str, Any]", checksums).values() if isinstance(checksums, dict) else [None]
    if not all(isinstance(checksum, str) for checksum in noted):
        raise DataError(f"{path}: sha256={checksums!r}; write a checksum for each file's name, or leave it out.")
    return found


def _map(path: Path, dtype: str) -> NDArray[Any]:
    little_endian = np.dtype(dtype).newbyteorder("<")
    try:
        if path.stat().st_size % little_endian.itemsize:
            raise DataError(f"{path}: its size is no multiple of {little_endian.itemsize} bytes; it is truncated.")
        return np.memmap(path, dtype=little_endian, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}.") from error


def _verified(path: Path, expected: dict[str, str]) -> str:
    """Compare the files with the checksums noted beside them; return one over both."""
    found = {name: _sha256(path / name) for name in (TOKENS, DOCUMENTS)}
    for name, checksum in found.items():
        if expected.get(name, checksum) != checksum:
            raise DataError(
                f"{path / name}: checksum {checksum[:12]}... instead of {expected[name][:12]}...; copy it again."
            )
    return hashlib.sha256("".join(found.values()).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()

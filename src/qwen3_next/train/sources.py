"""Find the documents that a configuration names, tokenising them where that has not been done yet."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qwen3_next.errors import DataError
from qwen3_next.train.config import DataSettings
from qwen3_next.train.data import PackedDocuments
from qwen3_next.train.tokens import META, TokenStore, tokenize_files


def open_documents(
    settings: DataSettings, cache: Path, vocab_size: int
) -> tuple[list[TokenStore], dict[str, PackedDocuments]]:
    """The training stores and the named validation sets.

    Args:
        cache: where tokenised copies of JSON lines are kept from run to run.

    Raises:
        DataError: a source is missing, unreadable, or does not fit the model.
    """
    directories = [Path(source) for source in settings.train if _is_tokenized(Path(source))]
    files = [Path(source) for source in settings.train if not _is_tokenized(Path(source))]
    stores = [TokenStore.open(path, vocab_size) for path in directories]
    if files:
        stores.append(_tokenized(files, settings, cache, vocab_size))
    for store in stores:
        store.verify()
    validation: dict[str, PackedDocuments] = {}
    for name, source in settings.validation.items():
        path = Path(source)
        is_ready = _is_tokenized(path)
        store = TokenStore.open(path, vocab_size) if is_ready else _tokenized([path], settings, cache, vocab_size)
        validation[name] = PackedDocuments([store], settings.sequence_length, settings.tokens_per_batch, 0)
    return stores, validation


def _is_tokenized(path: Path) -> bool:
    return (path / META).is_file()


def _tokenized(files: Sequence[Path], settings: DataSettings, cache: Path, vocab_size: int) -> TokenStore:
    target = cache / _fingerprint(files, settings.tokenizer)
    if not _is_tokenized(target):
        _tokenize(files, settings.tokenizer, target)
    return TokenStore.open(target, vocab_size)


def _tokenize(files: Sequence[Path], tokenizer_path: str, target: Path) -> None:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("tokenising")
        tokenizer = _tokenizer(tokenizer_path)
        tokenize_files(files, tokenizer, target, lambda rows: bar.update(task, description=f"tokenised {rows:,} rows"))


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer  # here, because tokenised data needs none

    if not path:
        raise DataError("data.tokenizer is empty, but JSON lines have to be tokenised; name a tokenizer directory.")
    return AutoTokenizer.from_pretrained(path)


def _fingerprint(files: Sequence[Path], tokenizer_path: str) -> str:
    """Changes with the tokenizer and with any file's name, size or time."""
    digest = hashlib.sha256(tokenizer_path.encode())
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file} is neither a file nor a tokenised directory; correct data.train or data.validation."
            )
        stat = file.stat()
        digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]

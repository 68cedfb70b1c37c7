"""Find the documents that a configuration names, tokenising them where that has not been done yet."""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qwen3_next.errors import ConfigError, DataError
from qwen3_next.train.config import DataSettings
from qwen3_next.train.data import PackedDocuments
from qwen3_next.train.tokens import META, TokenStore, tokenize_files

_MAIN_FILES = ("tokenizer.json", "vocab.json")
_TOKENIZER_FILES = (*_MAIN_FILES, "tokenizer_config.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")
_TEMPLATES = "*.jinja"


def open_documents(
    settings: DataSettings, cache: Path, vocab_size: int
) -> tuple[list[TokenStore], dict[str, PackedDocuments]]:
    """The training stores and the named validation sets.

    Args:
        cache: where tokenised copies of JSON lines are kept from run to run.

    Raises:
        ConfigError: JSON lines are named, but no tokenizer that can be read.
        DataError: a source is missing, unreadable, or does not fit the model.
        StorageError: the tokenised copy cannot be written.
    """
    directories = [Path(source) for source in settings.train if _is_tokenized(Path(source))]
    files = [Path(source) for source in settings.train if not _is_tokenized(Path(source))]
    stores = [TokenStore.open(path, vocab_size) for path in directories]
    if files:
        stores.append(_tokenized(files, settings, cache, vocab_size))
    validation: dict[str, PackedDocuments] = {}
    for name, source in settings.validation.items():
        path = Path(source)
        is_ready = _is_tokenized(path)
        store = TokenStore.open(path, vocab_size) if is_ready else _tokenized([path], settings, cache, vocab_size)
        validation[name] = PackedDocuments([store], settings.sequence_length, settings.tokens_per_batch, 0)
    return stores, validation


def copy_tokenizer(source: str, target: Path) -> None:
    """Put the files of a tokenizer into a directory: a directory's as they are, or those of a hub id.

    Raises:
        ConfigError: there is no tokenizer.
    """
    if not Path(source).is_dir():
        load_tokenizer(source).save_pretrained(target)
        return
    if not has_tokenizer(source):
        raise ConfigError(f"data.tokenizer={source!r} holds no {' or '.join(_MAIN_FILES)}; name another directory.")
    target.mkdir(parents=True, exist_ok=True)
    for file in _tokenizer_files(Path(source)):
        partial = target / f"{file.name}.partial"  # a kill must not leave half a tokenizer that looks like one
        shutil.copyfile(file, partial)
        partial.replace(target / file.name)


def has_tokenizer(directory: str) -> bool:
    """Whether a checkpoint's directory brings its tokenizer along."""
    return any(Path(directory, name).is_file() for name in _MAIN_FILES)


def load_tokenizer(source: str) -> Any:
    """A transformers tokenizer.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer  # here, because tokenised data needs none

    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data.tokenizer={source!r} cannot be read ({str(error).splitlines()[0]}); name a tokenizer's directory or "
            "a hub id."
        ) from error


def _is_tokenized(path: Path) -> bool:
    return (path / META).is_file()


def _tokenized(files: Sequence[Path], settings: DataSettings, cache: Path, vocab_size: int) -> TokenStore:
    target = cache / _fingerprint(files, settings.tokenizer)
    if not _is_tokenized(target):
        _tokenize(files, settings.tokenizer, target)
    return TokenStore.open(target, vocab_size)


def _tokenize(files: Sequence[Path], tokenizer_source: str, target: Path) -> None:
    if not tokenizer_source:
        raise ConfigError("data.tokenizer is empty, but JSON lines have to be tokenised; name a tokenizer directory.")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("tokenising")
        tokenizer = load_tokenizer(tokenizer_source)
        tokenize_files(files, tokenizer, target, lambda rows: bar.update(task, description=f"tokenised {rows:,} rows"))


def _fingerprint(files: Sequence[Path], tokenizer_source: str) -> str:
    """Changes with the tokenizer and with any file's name, size or time."""
    digest = hashlib.sha256(tokenizer_source.encode())
    for file in _tokenizer_files(Path(tokenizer_source)) if tokenizer_source else []:
        digest.update(file.read_bytes())
    for file in files:
        if not file.is_file():
            raise DataError(
                f"{file} is neither a file nor a tokenised directory; correct data.train or data.validation."
            )
        stat = file.stat()
        digest.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _tokenizer_files(directory: Path) -> list[Path]:
    named = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    return [*sorted(directory.glob(_TEMPLATES)), *reversed(named)]  # what has_tokenizer looks for comes last

"""Writing a checkpoint: sharded and streamed; a save that fails leaves the one before it intact."""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen3_next.errors import CheckpointError
from qwen3_next.model.checkpoint_files import DTYPE_NAMES, HEADER_LENGTH_BYTES, INDEX_FILE, SINGLE_FILE, bytes_of

DEFAULT_SHARD_BYTES = 4_000_000_000
"""The size of the published shards."""

_PARTIAL = ".partial"
_WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?(\.partial)?")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Entry:
    """One tensor to be written: `read` gives its values, on any device and in any dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return prod(self.shape) * self.dtype.itemsize


Shard = Sequence[Entry]


def write_checkpoint(
    directory: Path, entries: Sequence[Entry], max_shard_bytes: int, on_progress: Progress | None = None
) -> tuple[Path, ...]:
    """Write `model.safetensors`, or shards `model-0000i-of-0000N.safetensors` with their index, in the order given.

    Everything is written under temporary names first, so there must be room for two checkpoints where an older one is
    replaced. Its leftover shards are removed at the end.

    Returns:
        The weight files, in order.

    Raises:
        CheckpointError: the disk is full or not writable, or a dtype has no place in a checkpoint; the files of an
            earlier checkpoint are as they were.
    """
    for entry in entries:
        _check_dtype(entry)
    shards = _plan(entries, max_shard_bytes)
    names = _shard_names(len(shards))
    count = _counter(entries, on_progress)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, shard in zip(names, shards, strict=True):
            _write_synced(directory / (name + _PARTIAL), _shard_parts(shard, count))
        if len(names) > 1:
            _write_synced(directory / (INDEX_FILE + _PARTIAL), [_index_of(names, shards)])
        _publish(directory, names)
    except OSError as error:
        needed = sum(entry.nbytes for entry in entries)
        raise CheckpointError(
            f"{directory}: the checkpoint could not be written ({error.strerror or error}); the one before it is "
            f"intact. Free {needed} bytes beside it, or save elsewhere."
        ) from error
    finally:
        _remove_partial(directory, names)
    return tuple(directory / name for name in names)


def _remove_partial(directory: Path, names: Sequence[str]) -> None:
    for name in (*names, INDEX_FILE):
        # What made the writing fail may forbid this too; that error is the one to report.
        with suppress(OSError):
            (directory / (name + _PARTIAL)).unlink(missing_ok=True)


def _check_dtype(entry: Entry) -> None:
    if entry.dtype not in DTYPE_NAMES or entry.dtype == torch.float8_e4m3fn:
        raise CheckpointError(
            f"{entry.name} cannot be saved in {entry.dtype}; choose bfloat16, float16, float32 or float64."
        )


def _plan(entries: Sequence[Entry], max_bytes: int) -> list[Shard]:
    """Fill one shard after the other."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    # Wider dtypes first: then every tensor is aligned to its own width, as the format's readers want it.
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _counter(entries: Sequence[Entry], on_progress: Progress | None) -> Callable[[int], None]:
    total = sum(entry.nbytes for entry in entries)
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if on_progress is not None:
            on_progress(done, total)

    return count


def _shard_parts(shard: Shard, count: Callable[[int], None]) -> Iterator[bytes | memoryview]:
    """The header and then each tensor's bytes, of which one is held at a time."""
    yield _header_of(shard)
    for entry in shard:
        tensor = entry.read().detach()
        assert tuple(tensor.shape) == entry.shape, f"{entry.name} is {tuple(tensor.shape)}, planned as {entry.shape}"
        yield bytes_of(tensor.to("cpu", entry.dtype).contiguous())
        count(entry.nbytes)


def _write_synced(file: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file whose bytes are on the disk, not in a cache, when this returns."""
    with file.open("wb") as handle:
        for part in parts:
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())


def _header_of(shard: Shard) -> bytes:
    # transformers refuses a file without this metadata.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        start, end = end, end + entry.nbytes
        described = {"dtype": DTYPE_NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        header[entry.name] = described
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % HEADER_LENGTH_BYTES)
    return len(raw).to_bytes(HEADER_LENGTH_BYTES, "little") + raw


def _index_of(names: Sequence[str], shards: Sequence[Shard]) -> bytes:
    entries = [(name, entry) for name, shard in zip(names, shards, strict=True) for entry in shard]
    metadata = {
        "total_parameters": sum(prod(entry.shape) for _, entry in entries),
        "total_size": sum(entry.nbytes for _, entry in entries),
    }
    index = {"metadata": metadata, "weight_map": {entry.name: name for name, entry in entries}}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _publish(folder: Path, names: Sequence[str]) -> None:
    """Give the files their names, then remove what an earlier save left."""
    kept = {*names, INDEX_FILE} if len(names) > 1 else set(names)
    if len(names) > 1 and any((folder / name).exists() for name in names):
        # Killed between two renames, the directory would mix two checkpoints; without an index it is refused instead.
        (folder / INDEX_FILE).unlink(missing_ok=True)
    for name in (*names, *sorted(kept - set(names))):
        (folder / (name + _PARTIAL)).replace(folder / name)
    for path in list(folder.iterdir()):
        if _WEIGHT_FILE.fullmatch(path.name) and path.name not in kept:
            path.unlink()

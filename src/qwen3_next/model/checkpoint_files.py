"""Safetensors files: headers checked before anything is allocated, bytes read straight into tensors.

A file is 8 bytes of header length (little-endian), a JSON header of `{name: {dtype, shape, data_offsets}}`, and the
tensors' bytes without gaps (https://huggingface.co/docs/safetensors). No other format is read: a pickle can run code.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from qwen3_next.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""The dtypes that a checkpoint of this architecture may hold, by their safetensors names."""

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}

HEADER_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the format's own reader."""

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: bytes `start` to `end` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def locate(directory: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weight files of a local checkpoint directory, and the index's weight map where it is sharded.

    Raises:
        CheckpointError: there are none, or only pickled ones, or the index is malformed.
    """
    if (directory / SINGLE_FILE).is_file():
        return (directory / SINGLE_FILE,), None
    if (directory / INDEX_FILE).is_file():
        weight_map = _read_index(directory / INDEX_FILE)
        return tuple(directory / shard for shard in sorted(set(weight_map.values()))), weight_map
    found = sorted(path.name for path in directory.glob("*") if path.suffix in _PICKLES) if directory.is_dir() else []
    hint = f"{found[0]} is a pickle, which could run code: save it as safetensors first" if found else "check the path"
    raise CheckpointError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; {hint}.")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, after checking that the file is whole.

    Raises:
        CheckpointError: not a safetensors file, truncated or over-long, or an entry whose dtype, shape and byte range
            do not agree. Only the header has been read by then.
    """
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file} is not a safetensors file, and nothing else is read, because a pickle could run code; "
            "convert it with safetensors.torch.save_file on a machine where you trust it."
        )
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            raw = _read_raw_header(handle, file, size)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}; check the path.") from error
    header = _parse_header(raw, file)
    data_start = HEADER_LENGTH_BYTES + len(raw)
    tensors = {name: _stored(file, name, entry, data_start) for name, entry in header.items()}
    _check_extent(file, tensors, data_start, size)
    return tensors


def read_bytes(handle: BinaryIO, start: int, destination: Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes of the file from `start` on, without a copy in between.

    Raises:
        CheckpointError: the file ends before the tensor is full.
    """
    view = bytes_of(destination)
    handle.seek(start)
    while view:
        count = cast(int, handle.readinto(view))  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(f"{handle.name} ends {len(view)} bytes early; it was cut while being read.")
        view = view[count:]


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a checkpoint index ({error!r}); download it again.") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{file}: weight_map is not a table of names and files, or an empty one; download it again."
        )
    names = cast(dict[str, Any], weight_map)
    for name, shard in names.items():
        # A shard lies beside its index: a path in there would read files from elsewhere.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{file}: {name} is said to be in {shard!r}, which is not a plain file name.")
    return names


def _read_raw_header(handle: BinaryIO, file: Path, size: int) -> bytes:
    length = int.from_bytes(handle.read(HEADER_LENGTH_BYTES), "little")
    if size < HEADER_LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, size - HEADER_LENGTH_BYTES):
        raise CheckpointError(
            f"{file} is truncated or no safetensors file: it has {size} bytes, and its first "
            f"{HEADER_LENGTH_BYTES} announce a header of {length} (at most {_MAX_HEADER_BYTES} are allowed); "
            "download it again (git lfs pull, if the repository was cloned)."
        )
    return handle.read(length)


def _parse_header(raw: bytes, file: Path) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON ({error}); download it again.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a table of tensors; download it again.")
    entries = cast(dict[str, Any], header)
    entries.pop("__metadata__", None)
    return entries


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice!r} stands twice")
    return table


def _stored(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype_name, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the entry of {name} lacks dtype, shape or data_offsets ({error!r}).") from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} has the dtype {dtype_name!r}; {', '.join(DTYPES)} are read. "
            "Take the bf16 or the block-fp8 variant of the model."
        )
    numbers = (*shape, start, end)
    if any(type(number) is not int or number < 0 for number in numbers):
        raise CheckpointError(f"{file}: {name} has the shape {list(shape)} and the offsets {[start, end]}, no counts.")
    expected = prod(shape) * DTYPES[dtype_name].itemsize
    if end - start != expected:
        raise CheckpointError(
            f"{file}: {name} {list(shape)} in {dtype_name} takes {expected} bytes; the header gives it {end - start}."
        )
    return StoredTensor(file, DTYPES[dtype_name], shape, data_start + start, data_start + end)


def _check_extent(file: Path, tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    end = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if stored.start != end:
            raise CheckpointError(f"{file}: {name} starts at byte {stored.start}; the tensor before it ends at {end}.")
        end = stored.end
    if end != size:
        state = "truncated" if size < end else "too long"
        raise CheckpointError(f"{file} is {state}: expected {end} bytes, found {size}; download it again.")

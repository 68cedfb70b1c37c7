"""A tensor that still lies in its files: shape and dtype are known, reading waits until somebody asks."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import repeat
from math import prod
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from qwen3_next.errors import CheckpointError
from qwen3_next.model.checkpoint_files import DTYPE_NAMES, StoredTensor, read_bytes
from qwen3_next.ops.quant import FP8_BLOCK, dequantize_block_fp8

_CHUNK_BYTES = 2**20
"""What is held besides the destination where the stored dtype is not the one in memory; it stays in the cache."""

_ALIGNMENT = 64

_READERS, _PIECES_PER_READER = 4, 32
"""The experts of a layer are read by several threads: one alone copies at less than a disk's or a GPU's speed."""

_Open = Callable[[Path], BinaryIO]


@dataclass(frozen=True)
class Piece:
    """One stored tensor, its block scales where it is fp8, and its place in the flattened tensor in memory."""

    weight: StoredTensor
    scale: StoredTensor | None = None
    offset: int = 0


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in memory, made of the pieces that cover it exactly. Reading it is safe from several threads.

    transformers' loader takes it for a slice of a safetensors file: `lazy[...]` reads.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def __getitem__(self, index: EllipsisType | Any) -> Tensor:
        """The whole tensor for `...`, else that part of it."""
        tensor = self.read()
        return tensor if index is ... else tensor[index]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """Always true: a checkpoint of this architecture holds nothing else."""
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        """The shape, as a slice of a safetensors file gives it."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """The safetensors name of the dtype."""
        return DTYPE_NAMES[self.dtype]

    def read(self) -> Tensor:
        """Allocate the tensor once on the CPU and read every piece into its place, in the order of the files.

        Raises:
            CheckpointError: a file has vanished or shrunk since it was opened.
        """
        destination = _allocate(self.shape, self.dtype)
        pieces = sorted(self.pieces, key=lambda piece: (piece.weight.file, piece.weight.start))
        run = max(_PIECES_PER_READER, -(-len(pieces) // _READERS))
        runs = [pieces[start : start + run] for start in range(0, len(pieces), run)]
        try:
            if len(runs) == 1:
                _read_pieces(pieces, destination.view(-1))
            else:
                with ThreadPoolExecutor(len(runs)) as readers:
                    list(readers.map(_read_pieces, runs, repeat(destination.view(-1))))
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read any more: {error.strerror or error}.") from error
        return destination


def _read_pieces(pieces: Sequence[Piece], flat: Tensor) -> None:
    with ExitStack() as stack:
        open_file = _opener(stack)
        for piece in pieces:
            _read_piece(open_file, piece, flat[piece.offset : piece.offset + prod(piece.weight.shape)])


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised CPU memory. numpy asks the system for huge pages and torch does not: filling them is 3 x faster."""
    nbytes = prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + nbytes]).view(dtype).view(shape)


def _opener(stack: ExitStack) -> _Open:
    """Open each file once, unbuffered (the tensor itself is the buffer), until the stack closes."""
    handles: dict[Path, BinaryIO] = {}

    def open_file(file: Path) -> BinaryIO:
        if file not in handles:
            handles[file] = stack.enter_context(file.open("rb", buffering=0))
        return handles[file]

    return open_file


def _read_piece(open_file: _Open, piece: Piece, target: Tensor) -> None:
    if piece.scale is not None:
        _read_quantized(open_file, piece.weight, piece.scale, target)
    elif piece.weight.dtype == target.dtype:
        read_bytes(open_file(piece.weight.file), piece.weight.start, target)
    else:
        _read_cast(open_file(piece.weight.file), piece.weight, target)


def _read_cast(handle: BinaryIO, stored: StoredTensor, target: Tensor) -> None:
    width = stored.dtype.itemsize
    buffer = torch.empty(max(1, _CHUNK_BYTES // width), dtype=stored.dtype)
    for begin in range(0, len(target), len(buffer)):
        part = buffer[: len(target) - begin]
        read_bytes(handle, stored.start + begin * width, part)
        target[begin : begin + len(part)].copy_(part)


def _read_quantized(open_file: _Open, weight: StoredTensor, scale: StoredTensor, target: Tensor) -> None:
    rows, columns = weight.shape
    scales = torch.empty(scale.shape, dtype=scale.dtype)
    read_bytes(open_file(scale.file), scale.start, scales)
    blocks_at_once = max(1, _CHUNK_BYTES // max(1, FP8_BLOCK * columns))
    for block in range(0, len(scales), blocks_at_once):
        first = block * FP8_BLOCK
        values = torch.empty(min(blocks_at_once * FP8_BLOCK, rows - first), columns, dtype=weight.dtype)
        read_bytes(open_file(weight.file), weight.start + first * columns, values)
        made = dequantize_block_fp8(values, scales[block : block + blocks_at_once], target.dtype)
        target[first * columns : (first + len(values)) * columns].copy_(made.view(-1))

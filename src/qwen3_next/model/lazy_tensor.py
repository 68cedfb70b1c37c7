"""A tensor that still lies in its files: shape and dtype are known, reading waits until somebody asks."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from contextvars import copy_context
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from types import EllipsisType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qwen3_next.errors import CheckpointError
from qwen3_next.model.checkpoint_files import DTYPE_NAMES, StoredTensor, read_bytes
from qwen3_next.model.places import Place, empty
from qwen3_next.ops.quant import FP8_BLOCK

_READERS, _RUN_BYTES = 8, 2**25
"""Files are read by several threads, so much at a time: one alone copies at less than a disk's or a GPU's speed."""

_Open = Callable[[Path], BinaryIO]


@dataclass(frozen=True)
class Piece:
    """One stored tensor, its block scales where it is fp8, and its place in the flattened tensor in memory.

    Attributes:
        columns: the only ones that are wanted of its last dimension, from a number to below another; None for all.
    """

    weight: StoredTensor
    scale: StoredTensor | None = None
    offset: int = 0
    columns: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """In the files."""
        return sum(stored.end - stored.start for stored in (self.weight, self.scale) if stored is not None)


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
        destination = empty(self.shape, self.dtype, torch.device("cpu"))
        first = self.pieces[0].weight.shape
        rows = first[-2] if len(first) > 1 else 1
        fill([Filling(self.pieces, Place.of(destination, None, self.dtype, rows))])
        return destination


@dataclass(frozen=True)
class Filling:
    """Stored pieces that cover a place exactly."""

    pieces: tuple[Piece, ...]
    place: Place

    @property
    def nbytes(self) -> int:
        """In the files."""
        return sum(piece.nbytes for piece in self.pieces)


def fill(fillings: Iterable[Filling], on_read: Callable[[int], None] | None = None) -> None:
    """Read everything into its place, in the order of the files, a little by each of several threads.

    Values are converted and quantised on the device of their place, and besides the places only what is under way is
    held. All places are on one device.

    Args:
        on_read: called by the threads, with the bytes that were read since.

    Raises:
        CheckpointError: a file has vanished or shrunk since it was opened.
    """
    jobs = [(piece, filling.place) for filling in fillings for piece in filling.pieces]
    jobs.sort(key=lambda job: (job[0].weight.file, job[0].weight.start))
    runs, context, kernels = list(_runs(jobs)), copy_context(), Lock()

    def read(run: Sequence[_Job]) -> None:
        _read_run(run, kernels)
        if on_read is not None:
            on_read(sum(piece.nbytes for piece, _ in run))

    try:
        if len(runs) == 1:
            read(runs[0])
        else:
            with ThreadPoolExecutor(_READERS) as readers:
                # Which kernels are chosen is a matter of the caller's context.
                list(readers.map(lambda run: context.copy().run(read, run), runs))
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read any more: {error.strerror or error}.") from error


_Job = tuple[Piece, Place]


def _runs(jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
    run, size = list[_Job](), 0
    for job in jobs:
        run.append(job)
        size += job[0].nbytes
        if size >= _RUN_BYTES:
            yield run
            run, size = [], 0
    if run:
        yield run


def _read_run(run: Sequence[_Job], kernels: Lock) -> None:
    device = run[0][1].weight.device
    on_gpu = device.type == "cuda"
    with ExitStack() as stack, torch.cuda.device(device) if on_gpu else nullcontext():
        open_file = _opener(stack)
        for piece, place in run:
            for values, scales, part in _parts_of(piece, place, open_file):
                # One thread at a time launches kernels, because the first launch compiles.
                with kernels if on_gpu else nullcontext():
                    part.put(values) if scales is None else part.put_fp8(values, scales)
                if on_gpu:
                    torch.cuda.current_stream().synchronize()  # until then, `values` is read


def _parts_of(piece: Piece, place: Place, open_file: _Open) -> Iterator[tuple[Tensor, Tensor | None, Place]]:
    """Stored values, their scales where they are fp8, and where they belong, part by part."""
    weight, scale = piece.weight, piece.scale
    start, scale_start = weight.start, 0 if scale is None else scale.start
    first, end = (0, weight.shape[-1] if weight.shape else 1) if piece.columns is None else piece.columns
    for part in place.at(piece.offset, prod(weight.shape[:-1]) * (end - first)).parts():
        on_gpu = part.weight.is_cuda
        as_stored = not on_gpu and part.weight.dtype == weight.dtype and piece.columns is None
        stored_shape = (
            tuple(part.weight.shape) if piece.columns is None else (*part.weight.shape[:-1], weight.shape[-1])
        )
        values = part.weight if as_stored else _staging(stored_shape, weight.dtype, on_gpu)
        read_bytes(open_file(weight.file), start, values)
        start += values.nbytes
        scales = None
        if scale is not None:
            scales = _staging((-(-part.weight.shape[1] // FP8_BLOCK), scale.shape[1]), scale.dtype, on_gpu)
            read_bytes(open_file(scale.file), scale_start, scales)
            scale_start += scales.nbytes
        if piece.columns is not None:
            values = values[..., first:end].contiguous()
            scales = None if scales is None else scales[:, first // FP8_BLOCK : -(-end // FP8_BLOCK)].contiguous()
        yield values, scales, part


def _staging(shape: tuple[int, ...], dtype: torch.dtype, on_gpu: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=on_gpu)


def _opener(stack: ExitStack) -> _Open:
    """Open each file once, unbuffered (the tensor itself is the buffer), until the stack closes."""
    handles: dict[Path, BinaryIO] = {}

    def open_file(file: Path) -> BinaryIO:
        if file not in handles:
            handles[file] = stack.enter_context(file.open("rb", buffering=0))
        return handles[file]

    return open_file

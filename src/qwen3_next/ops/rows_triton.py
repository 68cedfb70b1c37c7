"""How kernels that treat each row on its own find the rows of a tensor, and how many they take at once."""
# pyright: basic

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from qwen3_next.ops.common_triton import multiprocessors

WIDEST = 16_384
"""Elements of a row that one program can hold."""

_MANY_INNER = 64
"""A kernel is compiled for every number of inner rows, so there should be few of them."""


class Rows(NamedTuple):
    """A tensor whose row i begins at `i // inner * outer_stride + i % inner * inner_stride`."""

    tensor: Tensor
    outer_stride: int
    inner_stride: int
    inner: int

    @property
    def addresses(self) -> tuple[Tensor, int, int]:
        """What a kernel gets beside the constant `inner`."""
        return self.tensor, self.outer_stride, self.inner_stride


def rows_of(x: Tensor) -> Rows:
    """The rows along the last dimension; of a copy where two strides do not describe them."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1] = levels[-1][0] * size, levels[-1][1]
        elif size != 1:
            levels.append((size, stride))
    if x.stride(-1) != 1 or len(levels) > 2 or (len(levels) == 2 and levels[0][0] > _MANY_INNER):
        return Rows(x.contiguous(), x.shape[-1], 0, 1)
    if len(levels) == 2:
        return Rows(x, levels[1][1], levels[0][1], levels[0][0])
    return Rows(x, levels[0][1] if levels else x.shape[-1], 0, 1)


def count_of(x: Tensor) -> int:
    """How many rows."""
    return x.numel() // max(1, x.shape[-1])


def tile_of(width: int, elements: int) -> dict[str, int]:
    """Rows and padded columns of a program that holds whole rows and about so many elements."""
    block = triton.next_power_of_2(width)
    return {"WIDTH": width, "BLOCK": block, "ROWS": max(1, elements // block)}


def looping(x: Tensor, rows: int, programs: int) -> int:
    """How many programs loop over the tiles of `x`: at most so many on each multiprocessor."""
    return min(triton.cdiv(count_of(x), rows), programs * multiprocessors(x.device))


@triton.jit
def offsets(o_row, outer_stride, inner_stride, INNER: tl.constexpr):
    """Where rows begin, in 64 bits: a tensor may have more than 2^31 elements."""
    o_row = o_row.to(tl.int64)
    if INNER == 1:
        return o_row * outer_stride
    return o_row // INNER * outer_stride + o_row % INNER * inner_stride

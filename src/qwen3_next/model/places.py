"""Where the values of a parameter go: memory without values yet, in block-fp8 or not, filled part by part."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor

from qwen3_next.ops.quant import FP8_BLOCK, dequantize_block_fp8, quantize_block_fp8

_ALIGNMENT = 64

_CPU_PART, _GPU_PART = 2**19, 2**23
"""How many values are converted at a time: as many as stay in a core's cache, or as keep a GPU busy."""


@dataclass(frozen=True)
class Place:
    """Matrices of one parameter. No block of scales lies across the border of two.

    Attributes:
        weight: `[M, R, C]`, contiguous: where the values go; a vector is one row.
        scales: `[M, ceil(R / 128), ceil(C / 128)]` fp32, where `weight` is e4m3; else None.
        dtype: what values are rounded to, before they are quantised where they are.
    """

    weight: Float[Tensor, "M R C"]
    scales: Float[Tensor, "M RB CB"] | None
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor, scales: Tensor | None, dtype: torch.dtype, rows: int) -> "Place":
        """All of a parameter whose matrices have so many rows, with `scales` as its module holds them."""
        columns = weight.shape[-1] if weight.dim() else 1
        matrices = weight.view(weight.numel() // max(1, rows * columns), rows, columns)
        blocks = (-(-size // FP8_BLOCK) for size in matrices.shape[1:])
        return cls(matrices, None if scales is None else scales.view(len(matrices), *blocks), dtype)

    def at(self, offset: int, count: int) -> "Place":
        """The matrices that hold `count` values from the one numbered `offset` on, or whole rows of one matrix."""
        each, columns = max(1, prod(self.weight.shape[1:])), max(1, self.weight.shape[2])
        if count % each:
            matrix, first = offset // each, offset % each // columns
            end = first + count // columns
            blocks = slice(first // FP8_BLOCK, -(-end // FP8_BLOCK))
            return self._cut(slice(matrix, matrix + 1), slice(first, end), blocks)
        chosen = slice(offset // each, (offset + count) // each)
        return replace(self, weight=self.weight[chosen], scales=None if self.scales is None else self.scales[chosen])

    def parts(self) -> Iterator["Place"]:
        """In order, parts that are converted at a time: some whole matrices, or some rows of blocks of one."""
        most = _CPU_PART if self.weight.device.type == "cpu" else _GPU_PART
        count, rows, columns = self.weight.shape
        at_once, blocks = most // max(1, rows * columns), max(1, most // max(1, FP8_BLOCK * columns))
        if at_once or rows <= FP8_BLOCK:
            for start in range(0, count, max(1, at_once)):
                yield self._cut(slice(start, start + max(1, at_once)), slice(None), slice(None))
            return
        for matrix in range(count):
            for start in range(0, -(-rows // FP8_BLOCK), blocks):
                end = start + blocks
                yield self._cut(slice(matrix, matrix + 1), slice(start * FP8_BLOCK, end * FP8_BLOCK), slice(start, end))

    @torch.no_grad()
    def put(self, values: Float[Tensor, "M R C"]) -> None:
        """Take ordinary values, from the CPU or this device; a GPU may still be reading them afterwards."""
        if self.scales is None:
            self.weight.copy_(values, non_blocking=True)
        else:
            made = quantize_block_fp8(values.to(self.weight.device, non_blocking=True).to(self.dtype))
            self.weight.copy_(made.values)
            self.scales.copy_(made.scale_inv)

    @torch.no_grad()
    def put_fp8(self, values: Float8e4m3fn[Tensor, "1 R C"], scales: Float[Tensor, "RB CB"]) -> None:
        """Likewise take one matrix or some of its rows that are block-fp8: bit by bit, or dequantised."""
        if self.scales is None:
            codes, factors = (x.to(self.weight.device, non_blocking=True) for x in (values[0], scales))
            self.weight.copy_(dequantize_block_fp8(codes, factors, self.dtype)[None])
        else:
            self.weight.copy_(values, non_blocking=True)
            self.scales.copy_(scales, non_blocking=True)

    def _cut(self, matrices: slice, rows: slice, blocks: slice) -> "Place":
        scales = None if self.scales is None else self.scales[matrices, blocks]
        return replace(self, weight=self.weight[matrices, rows], scales=scales)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory without values.

    On the CPU numpy gets it: it asks the system for huge pages and torch does not, and filling them is 3 x faster.

    Raises:
        MemoryError, torch.OutOfMemoryError: there is too little.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = prod(shape) * dtype.itemsize
    memory = np.empty(nbytes + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return torch.from_numpy(memory[start : start + nbytes]).view(dtype).view(shape)

"""Packed sequences cut into chunks of one size, all in one batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.segments import Segments


@dataclass(frozen=True, eq=False)
class Chunks:
    """Where the tokens of packed sequences stand in a grid of G chunks.

    Chunk c of every sequence comes before chunk c + 1 of any, and inside one c the longest sequence comes first. So the
    chunks that a step of a scan over c needs are consecutive, and the sequences that have ended are always the last.

    Attributes:
        size: tokens per chunk; the last chunk of a sequence is filled up with zeros.
        active: for each c, how many sequences have a chunk c. Never increases; sums to G.
        uniform: the number of sequences, where all have the same length; the grid is then a mere view. Else 0.
        slots: `[T]` the place of each token in the flattened grid `[G * size]`; None where `uniform`.
        order: `[N]` the sequences, longest first; None where they are so already.
    """

    size: int
    active: tuple[int, ...]
    uniform: int
    slots: Int[Tensor, "T"] | None
    order: Int[Tensor, "N"] | None

    @classmethod
    def of(cls, segments: Segments, size: int) -> "Chunks":
        """Cut sequences, of which at least one has a token, into chunks of `size` tokens."""
        counts = [-(-length // size) for length in segments.lengths]
        active = tuple(sum(n > c for n in counts) for c in range(max(counts)))
        if segments.is_uniform:
            return cls(size, active, segments.count, None, None)
        lengths = segments.cu_seqlens.diff()
        order = lengths.argsort(descending=True, stable=True)
        is_sorted = all(a >= b for a, b in zip(segments.lengths, segments.lengths[1:], strict=False))
        return cls(size, active, 0, _slots(segments, order.argsort(), size), None if is_sorted else order)

    def split(self, x: Float[Tensor, "T H D"]) -> Float[Tensor, "G H size D"]:
        """The tokens in their chunks, heads outside; zeros where a chunk has no token."""
        if self.slots is not None:
            grid = x.new_zeros(sum(self.active) * self.size, *x.shape[1:]).index_copy_(0, self.slots, x)
            return grid.unflatten(0, (-1, self.size)).transpose(1, 2).contiguous()
        rows = x.unflatten(0, (self.uniform, -1))
        missing = len(self.active) * self.size - rows.shape[1]
        rows = F.pad(rows, (0, 0, 0, 0, 0, missing)) if missing else rows
        return rows.unflatten(1, (-1, self.size)).permute(1, 0, 3, 2, 4).flatten(0, 1).contiguous()

    def join(self, x: Float[Tensor, "G H size D"], tokens: int) -> Float[Tensor, "T H D"]:
        """Back to `tokens` packed tokens: the inverse of `split`."""
        if self.slots is not None:
            return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)
        rows = x.unflatten(0, (-1, self.uniform)).permute(1, 0, 3, 2, 4).flatten(1, 2)
        return rows[:, : tokens // self.uniform].flatten(0, 1)

    def sort(self, x: Float[Tensor, "N *D"]) -> Float[Tensor, "N *D"]:
        """One entry per sequence, in the order of the grid."""
        return x if self.order is None else x.index_select(0, self.order)

    def unsort(self, x: Float[Tensor, "N *D"]) -> Float[Tensor, "N *D"]:
        """The inverse of `sort`."""
        return x if self.order is None else x.index_select(0, self.order.argsort())


def _slots(segments: Segments, ranks: Int[Tensor, "N"], size: int) -> Int[Tensor, "T"]:
    counts = (segments.cu_seqlens.diff() + size - 1) // size
    numbers = torch.arange(-(-segments.max_length // size), device=segments.device)
    active = (counts > numbers[:, None]).sum(1)
    first = active.cumsum(0) - active
    chunk = first[segments.offsets // size] + ranks[segments.sequence_ids]
    return chunk * size + segments.offsets % size

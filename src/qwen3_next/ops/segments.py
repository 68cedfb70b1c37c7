"""Where each packed sequence starts and ends, known to the device and to the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """The borders of N sequences packed into T tokens.

    Attributes:
        cu_seqlens: `[N+1]` int32 on the device; sequence n owns the tokens `cu_seqlens[n]:cu_seqlens[n+1]`.
        lengths: the same N lengths as host integers (zero is allowed), so that no operation has to wait for the
            device to learn a shape.

    Indices derived from the borders are computed once per object; one object serves all layers of a forward pass.
    """

    cu_seqlens: Int[Tensor, "N+1"]
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> "Segments":
        """Borders of sequences with these lengths, in this order."""
        borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(to_device(borders, device), tuple(lengths))

    @classmethod
    def uniform(cls, count: int, length: int, device: torch.device | str | None = None) -> "Segments":
        """Borders of `count` sequences of one length, made on the device itself."""
        borders = torch.arange(count + 1, dtype=torch.int32, device=device) * length
        return cls(borders, (length,) * count)

    @property
    def count(self) -> int:
        """N, the number of sequences."""
        return len(self.lengths)

    @cached_property
    def total(self) -> int:
        """T, the number of packed tokens."""
        return sum(self.lengths)

    @cached_property
    def max_length(self) -> int:
        """The length of the longest sequence; 0 where there is none."""
        return max(self.lengths, default=0)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all sequences have the same length, so that `[T, ...]` views as `[N, length, ...]`."""
        return self.count > 0 and self.max_length * self.count == self.total

    @property
    def device(self) -> torch.device:
        """The device of `cu_seqlens`."""
        return self.cu_seqlens.device

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The index of each sequence's first token."""
        return tuple(accumulate(self.lengths[:-1], initial=0)) if self.lengths else ()

    @cached_property
    def sequence_ids(self) -> Int[Tensor, "T"]:
        """The sequence that each token belongs to."""
        counts = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()
        ids = torch.arange(self.count, device=self.device)
        return ids.repeat_interleave(counts, output_size=self.total)

    @cached_property
    def offsets(self) -> Int[Tensor, "T"]:
        """The index of each token inside its sequence."""
        return torch.arange(self.total, device=self.device) - self.cu_seqlens[:-1].long()[self.sequence_ids]

    @cached_property
    def parts(self) -> "dict[int, Parts]":
        """What `cut` has found, by size."""
        return {}

    def cut(self, size: int) -> "Parts":
        """The sequences in parts of `size` tokens, found once per size."""
        if size not in self.parts:
            self.parts[size] = Parts.of(self, size)
        return self.parts[size]

    @cached_property
    def splits(self) -> "dict[int, tuple[Segments, Segments]]":
        """What `split` has found, by count."""
        return {}

    def split(self, count: int) -> "tuple[Segments, Segments]":
        """The first `count` sequences and the others, each as if they were alone; found once per count."""
        if count not in self.splits:
            borders = self.cu_seqlens
            others = Segments(borders[count:] - borders[count], self.lengths[count:])
            self.splits[count] = Segments(borders[: count + 1], self.lengths[:count]), others
        return self.splits[count]


@dataclass(frozen=True, eq=False)
class Parts:
    """Sequences cut into parts of one size; a part never holds tokens of two sequences.

    Attributes:
        size: tokens of a part; the last part of a sequence may have fewer.
        count: G, the number of parts.
        first: `[N+1]` int32: the parts `first[n]:first[n+1]` are those of sequence n.
        sequences: `[G]` int32: the sequence of each part.
        cu_seqlens: `[N+1]` int32, the borders of the sequences.

    Part g holds the tokens from `cu_seqlens[n] + size * (g - first[n])` on, with n = `sequences[g]`.
    """

    size: int
    count: int
    first: Int[Tensor, "N+1"]
    sequences: Int[Tensor, "G"]
    cu_seqlens: Int[Tensor, "N+1"]

    @classmethod
    def of(cls, segments: Segments, size: int) -> "Parts":
        """Cut on the device, without waiting for it. A sequence without tokens has no part."""
        count = sum(-(-length // size) for length in segments.lengths)
        counts = (segments.cu_seqlens.diff() + (size - 1)) // size
        first = torch.zeros_like(segments.cu_seqlens)
        torch.cumsum(counts, 0, dtype=torch.int32, out=first[1:])
        ids = torch.arange(segments.count, device=segments.device, dtype=torch.int32)
        return cls(size, count, first, ids.repeat_interleave(counts.long(), output_size=count), segments.cu_seqlens)


def to_device(values: Tensor, device: torch.device | str | None) -> Tensor:
    """Copy host values without making the host wait for the device."""
    if device is None or values.is_cuda or torch.device(device).type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)

"""Which states inside a call are kept, and where: what lets another request continue from the middle of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.segments import Segments, to_device


@dataclass(frozen=True, eq=False)
class Snapshots:
    """S copies of states in the middle of a call.

    The state after p packed tokens is the one that token p - 1 leaves in its own sequence; so where p is the border
    between two sequences, it is the final state of the first. After 0 tokens it is the state that enters the first
    sequence that has tokens.

    Attributes:
        positions: p of each copy, as host integers, ascending.
        after: `[S]` the same int32 on the device.
        slots: `[S]` int32: where each copy goes, in the tensor of states that the call reads and writes. No sequence of
            the call may own one of these.
    """

    positions: tuple[int, ...]
    after: Int[Tensor, "S"]
    slots: Int[Tensor, "S"]

    @classmethod
    def at(
        cls, positions: Sequence[int], slots: Sequence[int], device: torch.device | str | None = None
    ) -> "Snapshots":
        """Copies after these numbers of packed tokens, in any order, each into the slot of the same index.

        Raises:
            InputError: there are more positions than slots or fewer, or a number is negative.
        """
        if len(positions) != len(slots) or min((*positions, *slots), default=0) < 0:
            raise InputError(f"snapshots: one slot per position, none negative; got {positions=} and {slots=}.")
        pairs = sorted(zip(positions, slots, strict=True))
        both = to_device(torch.tensor(pairs, dtype=torch.int32).view(-1, 2).T.contiguous(), device)
        return cls(tuple(p for p, _ in pairs), both[0], both[1])

    def by_sequence(self, segments: Segments) -> list[list[int]]:
        """For each sequence, the indices of the copies that are taken from it; none from a sequence without tokens."""
        found: list[list[int]] = []
        for start, length in zip(segments.starts, segments.lengths, strict=True):
            first = start + 1 if start else 0
            taken = range(first, start + length + 1) if length else range(0)
            found.append([i for i, position in enumerate(self.positions) if position in taken])
        return found

    @cached_property
    def stretches(self) -> "dict[Segments, Stretches]":
        """What `cut` has found, by segments."""
        return {}

    def cut(self, segments: Segments) -> "Stretches":
        """The sequences in stretches that end where a copy is taken, found once for the layers of a forward pass."""
        if segments not in self.stretches:
            self.stretches[segments] = Stretches.of(segments, self)
        return self.stretches[segments]


@dataclass(frozen=True, eq=False)
class Stretches:
    """Sequences cut where copies of their states are taken. A sequence without tokens has no stretch.

    Attributes:
        segments: the stretches one after the other, as if they were sequences; some may be empty.
        first: `[N+1]` int32: the stretches `first[n]:first[n+1]` are those of sequence n.
        owners: `[P]` int64: where the state after each stretch goes: i < N is the place of sequence i, N + i that of
            copy i.
    """

    segments: Segments
    first: Int[Tensor, "N+1"]
    owners: Int[Tensor, "P"]

    @classmethod
    def of(cls, segments: Segments, snapshots: Snapshots) -> "Stretches":
        """Cut on the host, which knows all borders."""
        lengths: list[int] = []
        first, owners = [0], list[int]()
        for n, copies in enumerate(snapshots.by_sequence(segments)):
            position = segments.starts[n]
            for i in copies:
                lengths.append(snapshots.positions[i] - position)
                owners.append(segments.count + i)
                position = snapshots.positions[i]
            if segments.lengths[n]:
                lengths.append(segments.starts[n] + segments.lengths[n] - position)
                owners.append(n)
            first.append(len(lengths))
        device = segments.device
        borders = to_device(torch.tensor(first, dtype=torch.int32), device)
        return cls(Segments.from_lengths(lengths, device), borders, to_device(torch.tensor(owners), device))

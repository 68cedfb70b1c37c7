"""Which states inside a call are kept, and where: what lets another request continue from the middle of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

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

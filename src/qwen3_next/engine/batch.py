"""A plan of the scheduler as tensors: what one call of the network reads, and which rows of it are wanted."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from qwen3_next.engine.memory import Copy
from qwen3_next.engine.plan import Plan, ScheduledSequence
from qwen3_next.engine.sampler import Choice
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.packed_cache import PackedCache, PackedMemory
from qwen3_next.ops.segments import Segments, to_device
from qwen3_next.ops.snapshots import Snapshots


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the network.

    Attributes:
        rows: which packed tokens need logits, in the order of the sequences that sample; `1 + drafts` of each.
        sampling: those sequences.
    """

    inputs: PackedInputs
    cache: PackedCache
    rows: Int[Tensor, "R"]
    sampling: tuple[ScheduledSequence, ...]

    @classmethod
    def build(cls, plan: Plan, memory: PackedMemory, earlier: "Choice | None" = None) -> "Batch":
        """Put the sequences of a plan one after the other; the copies that come first are not part of it.

        Where no step brings drafts there is nothing to reject: every token joins its state at once. Should earlier
        tokens be pending, they join before, for which steps are computed as chunks this once.

        Args:
            earlier: what the call before chooses, where the host does not know it yet; that call had no drafts.
        """
        has_pending = any(sequence.accepted for sequence in plan)
        steps = 0 if plan.joins and has_pending else sum(sequence.awaits_verdict for sequence in plan)
        device, sequences = memory.keys.device, plan.sequences
        lengths = [sequence.length for sequence in sequences]
        segments = Segments.from_lengths(lengths, device)
        positions = [place for sequence in sequences for place in range(sequence.start, sequence.end)]
        inputs = PackedInputs(_token_ids(sequences, earlier, device), integers(positions, device).long(), segments)
        ends, accepted = [s.end for s in sequences], [s.accepted for s in sequences]
        cache = PackedCache(
            memory,
            table=page_table(sequences, device),
            lengths=integers(ends, device),
            slots=integers([sequence.slot for sequence in sequences], device),
            accepted=integers(accepted, device) if has_pending or not plan.joins else None,
            known_lengths=tuple(ends),
            snapshots=_snapshots(sequences[steps:], device),
            steps=steps,
        )
        starts = itertools.accumulate(lengths)
        rows = [
            end - 1 - drafts
            for sequence, end in zip(sequences, starts, strict=True)
            if sequence.samples
            for drafts in range(sequence.drafts, -1, -1)
        ]
        sampling = tuple(sequence for sequence in sequences if sequence.samples)
        return cls(inputs, cache, integers(rows, device).long(), sampling)


def _token_ids(
    sequences: Sequence[ScheduledSequence], earlier: Choice | None, device: torch.device
) -> Int[Tensor, "T"]:
    """What the host knows of them; the rest goes from one call to the next on the device."""
    ids, places, rows = list[int](), list[int](), list[int]()
    for sequence in sequences:
        known = sequence.token_ids
        if len(known) < sequence.length:
            assert earlier is not None
            places.append(len(ids))
            rows.append(earlier.rows[sequence.request.request_id])
            known = (0,)
        ids += known
    tokens = integers(ids, device).long()
    if earlier is not None and places:
        chosen = earlier.tokens.clamp(min=0)  # a row that failed: nobody asks what becomes of it
        tokens[integers(places, device).long()] = chosen[integers(rows, device).long()]
    return tokens


def prepare_memory_(plan: Plan, memory: PackedMemory) -> None:
    """Copy and clear what the sequences of a plan start from."""
    states = [sequence.state_copy for sequence in plan if sequence.state_copy is not None]
    for tensor in (memory.recurrent, memory.conv, memory.pending_qkv, memory.pending_ba):
        _copy_(tensor, states)
    copy_pages_(plan, memory)
    empty = [sequence.slot for sequence in plan if sequence.starts_empty]
    if empty:
        memory.clear_(integers(empty, memory.keys.device))


def copy_pages_(plan: Plan, memory: PackedMemory) -> None:
    """Copy the pages that the sequences of a plan go on writing."""
    pages = [sequence.page_copy for sequence in plan if sequence.page_copy is not None]
    for tensor in (memory.keys, memory.values):
        _copy_(tensor, pages)


def page_table(sequences: Sequence[ScheduledSequence], device: torch.device) -> Int[Tensor, "N M"]:
    """The pages of each sequence, filled up to the most of them."""
    widest = max(len(sequence.pages) for sequence in sequences)
    return integers([[*sequence.pages, *(0,) * (widest - len(sequence.pages))] for sequence in sequences], device)


def _copy_(tensor: Tensor, copies: list[Copy]) -> None:
    if copies:
        sources, targets = zip(*((copy.source, copy.target) for copy in copies), strict=True)
        device = tensor.device
        tensor[:, integers([*targets], device).long()] = tensor[:, integers([*sources], device).long()]


def _snapshots(sequences: Sequence[ScheduledSequence], device: torch.device) -> Snapshots | None:
    """Positions among the tokens of sequences that are computed as chunks; a step asks for none."""
    positions, slots, before = list[int](), list[int](), 0
    for sequence in sequences:
        for order in sequence.snapshots:
            positions.append(before + order.position - sequence.start)
            slots.append(order.slot)
        before += sequence.length
    return Snapshots.at(positions, slots, device) if positions else None


def integers(values: list[int] | list[list[int]], device: torch.device) -> Int[Tensor, "*N"]:
    """As int32 on a device."""
    return to_device(torch.tensor(values, dtype=torch.int32), device)

"""A plan of the scheduler as tensors: what one call of the network reads, and which rows of it are wanted."""

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
from qwen3_next.ops.pages import PAGE
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
    def build(
        cls, plan: Plan, memory: PackedMemory, earlier: Choice | None = None, *, is_uniform: bool = False
    ) -> "Batch":
        """Put the sequences of a plan one after the other; the copies that come first are not part of it.

        Where no step brings drafts there is nothing to reject: every token joins its state at once. Should earlier
        tokens be pending, they join before, for which steps are computed as chunks this once.

        Args:
            earlier: what the call before chooses, where the host does not know it yet; that call had no drafts.
            is_uniform: where all sequences are steps, let those with fewer drafts than others bring as many tokens.
                What these write is never read: it lies behind the last position that counts, or in the reserved page.
        """
        has_pending = any(sequence.accepted for sequence in plan)
        steps = 0 if plan.joins and has_pending else sum(sequence.awaits_verdict for sequence in plan)
        device, sequences = memory.keys.device, plan.sequences
        lengths = [sequence.length for sequence in sequences]
        if is_uniform and steps == len(sequences):
            lengths = [max(lengths)] * len(lengths)
        segments = Segments.from_lengths(lengths, device)
        ends = [sequence.start + length for sequence, length in zip(sequences, lengths, strict=True)]
        positions = [place for s, end in zip(sequences, ends, strict=True) for place in range(s.start, end)]
        tokens = _Tokens.of(sequences, lengths, earlier)
        rows = [
            start + sequence.length - 1 - drafts
            for sequence, start in zip(sequences, segments.starts, strict=True)
            if sequence.samples
            for drafts in range(sequence.drafts, -1, -1)
        ]
        slots, accepted = [sequence.slot for sequence in sequences], [sequence.accepted for sequence in sequences]
        lists = (tokens.ids, tokens.places, tokens.rows, positions, rows, ends, slots, accepted)
        ids, places, chosen, place_ids, row_ids, end_ids, slot_ids, accepted_ids = split_integers(lists, device)
        if earlier is not None and tokens.places:  # a row that failed: nobody asks what becomes of it
            ids[places.long()] = earlier.tokens.clamp(min=0)[chosen.long()].int()
        inputs = PackedInputs(ids.long(), place_ids.long(), segments)
        cache = PackedCache(
            memory,
            table=page_table(sequences, device, max(ends)),
            lengths=end_ids,
            slots=slot_ids,
            accepted=accepted_ids if has_pending or not plan.joins else None,
            known_lengths=tuple(ends),
            snapshots=_snapshots(sequences[steps:], device),
            steps=steps,
        )
        return cls(inputs, cache, row_ids.long(), tuple(sequence for sequence in sequences if sequence.samples))


@dataclass(frozen=True)
class _Tokens:
    """The tokens of a call: what the host knows, zeros to fill up, and where what the call before chooses goes.

    Attributes:
        places: among the ids.
        rows: of the choice, for each place.
    """

    ids: list[int]
    places: list[int]
    rows: list[int]

    @classmethod
    def of(cls, sequences: Sequence[ScheduledSequence], lengths: Sequence[int], earlier: Choice | None) -> "_Tokens":
        tokens = cls([], [], [])
        for sequence, length in zip(sequences, lengths, strict=True):
            known = sequence.token_ids
            if len(known) < sequence.length:
                assert earlier is not None
                tokens.places.append(len(tokens.ids))
                tokens.rows.append(earlier.rows[sequence.request.request_id])
            tokens.ids.extend((*known, *(0,) * (length - len(known))))
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


def page_table(sequences: Sequence[ScheduledSequence], device: torch.device, tokens: int = 0) -> Int[Tensor, "N M"]:
    """The pages of each sequence, filled up with the reserved one to the most of them, and to those of `tokens`."""
    widest = max(-(-tokens // PAGE), *(len(sequence.pages) for sequence in sequences))
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


def split_integers(lists: Sequence[list[int]], device: torch.device) -> tuple[Int[Tensor, "*N"], ...]:
    """Several of them with one copy."""
    return integers([value for values in lists for value in values], device).split([len(values) for values in lists])

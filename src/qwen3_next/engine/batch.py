"""A plan of the scheduler as tensors: what one call of the network reads, and which rows of it are wanted."""

import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from qwen3_next.engine.memory import Copy
from qwen3_next.engine.plan import Plan, ScheduledSequence
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.packed_cache import PackedCache, PackedMemory
from qwen3_next.ops.segments import Segments, to_device
from qwen3_next.ops.snapshots import Snapshots


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the network.

    Attributes:
        rows: which packed tokens need logits, in the order of the sequences that sample.
        sampling: those sequences.
    """

    inputs: PackedInputs
    cache: PackedCache
    rows: Int[Tensor, "R"]
    sampling: tuple[ScheduledSequence, ...]

    @classmethod
    def build(cls, plan: Plan, memory: PackedMemory) -> "Batch":
        """Put the sequences of a plan one after the other; the copies that come first are not part of it.

        Where the memory has no room for pending tokens there are no drafts to reject: every token joins its state at
        once, and what the plan calls pending has joined already.
        """
        has_pending = memory.pending_qkv.shape[2] > 0
        device, sequences = memory.keys.device, plan.sequences
        lengths = [sequence.length for sequence in sequences]
        segments = Segments.from_lengths(lengths, device)
        tokens = [token for sequence in sequences for token in sequence.token_ids]
        positions = [place for sequence in sequences for place in range(sequence.start, sequence.end)]
        inputs = PackedInputs(_integers(tokens, device).long(), _integers(positions, device).long(), segments)
        ends = [sequence.end for sequence in sequences]
        widest = max(len(sequence.pages) for sequence in sequences)
        pages = [[*sequence.pages, *(0,) * (widest - len(sequence.pages))] for sequence in sequences]
        cache = PackedCache(
            memory,
            table=_integers(pages, device),
            lengths=_integers(ends, device),
            slots=_integers([sequence.slot for sequence in sequences], device),
            accepted=_integers([sequence.accepted for sequence in sequences], device) if has_pending else None,
            known_lengths=tuple(ends),
            snapshots=_snapshots(sequences, device),
            steps=sum(sequence.awaits_verdict for sequence in sequences),
        )
        starts = itertools.accumulate(lengths)
        rows = [
            end - 1 - drafts
            for sequence, end in zip(sequences, starts, strict=True)
            if sequence.samples
            for drafts in range(sequence.drafts, -1, -1)
        ]
        return cls(inputs, cache, _integers(rows, device).long(), tuple(s for s in sequences if s.samples))


def prepare_memory_(plan: Plan, memory: PackedMemory) -> None:
    """Copy and clear what the sequences of a plan start from."""
    states = [sequence.state_copy for sequence in plan if sequence.state_copy is not None]
    pages = [sequence.page_copy for sequence in plan if sequence.page_copy is not None]
    for tensor in (memory.recurrent, memory.conv, memory.pending_qkv, memory.pending_ba):
        _copy_(tensor, states)
    for tensor in (memory.keys, memory.values):
        _copy_(tensor, pages)
    empty = [sequence.slot for sequence in plan if sequence.starts_empty]
    if empty:
        memory.clear_(_integers(empty, memory.keys.device))


def _copy_(tensor: Tensor, copies: list[Copy]) -> None:
    if copies:
        sources, targets = zip(*((copy.source, copy.target) for copy in copies), strict=True)
        tensor[:, list(targets)] = tensor[:, list(sources)]


def _snapshots(sequences: tuple[ScheduledSequence, ...], device: torch.device) -> Snapshots | None:
    """Positions among the tokens of all chunks; steps, which come first, ask for none."""
    positions, slots, before = list[int](), list[int](), 0
    for sequence in sequences:
        if sequence.awaits_verdict:
            continue
        for order in sequence.snapshots:
            positions.append(before + order.position - sequence.start)
            slots.append(order.slot)
        before += sequence.length
    return Snapshots.at(positions, slots, device) if positions else None


def _integers(values: list[int] | list[list[int]], device: torch.device) -> Int[Tensor, "*N"]:
    return to_device(torch.tensor(values, dtype=torch.int32), device)

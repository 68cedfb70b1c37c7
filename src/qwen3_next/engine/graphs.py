"""Decoding, verification and drafting as CUDA graphs: one launch for a call of the network or of the MTP layer."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.engine.batch import Batch
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.packed_cache import PackedCache, PackedMemory
from qwen3_next.ops.segments import Segments

RUNGS_PER_OCTAVE = 4
"""Batch sizes between two powers of two; half of the distance of two is wasted on average, 6 % of a call."""

NULL_SLOT = -1


@dataclass(frozen=True)
class Shape:
    """What a graph is captured for.

    Attributes:
        rung: sequences, null ones included.
        length: new tokens of each, drafts included.
        has_accepted: tokens of the call before may be pending.
    """

    rung: int
    length: int
    has_accepted: bool


@dataclass(frozen=True, eq=False)
class Call:
    """What a graph reads.

    Attributes:
        hidden: for the MTP layer, of each token.
        rows: for the MTP layer, the one token of each sequence that is asked for.
    """

    inputs: PackedInputs
    cache: PackedCache
    hidden: Float[Tensor, "T D"] | None = None
    rows: Int[Tensor, "N"] | None = None


Compute = Callable[[Call], tuple[Float[Tensor, "R D"], Float[Tensor, "R V"]]]
"""States and logits; of all tokens of a call, or of its rows."""


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph with what it reads and writes, in tensors that stay where they are."""

    graph: torch.cuda.CUDAGraph
    call: Call
    hidden: Float[Tensor, "R D"]
    logits: Float[Tensor, "R V"]


class Graphs:
    """A function of sequences that all bring the same few tokens, captured for a ladder of batch sizes.

    A batch is filled up to the next rung with null sequences, which read and write nothing. Graphs share the memory of
    what happens inside them.
    """

    def __init__(
        self, compute: Compute, memory: PackedMemory, *, most: int, pages: int, width: int | None = None
    ) -> None:
        """Capture nothing yet; a graph is captured when it is first asked for.

        Args:
            compute: what is captured; of nothing but the call and what stays where it is.
            most: sequences of a call.
            pages: of one sequence.
            width: D, where calls have hidden states and rows.
        """
        self._compute, self._memory, self._most, self._pages, self._width = compute, memory, most, pages, width
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Shape, _Captured] = {}

    def capture(self, length: int, *, has_accepted: bool) -> None:
        """Of all rungs, the largest first, whose memory then serves all."""
        for rung in sorted({rung_of(count, self._most) for count in range(1, self._most + 1)}, reverse=True):
            self._get(Shape(rung, length, has_accepted))

    def run(self, call: Call) -> tuple[Float[Tensor, "R D"], Float[Tensor, "R V"]]:
        """States, which are copies, and logits, which the next call may overwrite, of `call`, which has a shape."""
        segments = call.inputs.segments
        shape = Shape(rung_of(segments.count, self._most), segments.max_length, call.cache.accepted is not None)
        captured = self._get(shape)
        own, count, tokens = captured.call, segments.count, segments.total
        own.cache.table[:count, : call.cache.table.shape[1]] = call.cache.table
        for mine, theirs, null in _pairs(own, call):
            mine[: len(theirs)] = theirs
            if null is not None:
                mine[count:] = null
        captured.graph.replay()
        results = count if call.rows is not None else tokens
        return captured.hidden[:results].clone(), captured.logits[:results]  # states may be read after the next call

    def _get(self, shape: Shape) -> _Captured:
        if shape not in self._captured:
            self._captured[shape] = self._capture(shape)
        return self._captured[shape]

    @torch.inference_mode()
    def _capture(self, shape: Shape) -> _Captured:
        """Of null sequences, so that nothing is changed by it."""
        device, count, tokens = self._memory.keys.device, shape.rung, shape.rung * shape.length
        zeros = torch.zeros(tokens, dtype=torch.long, device=device)
        inputs = PackedInputs(zeros, zeros.clone(), Segments.uniform(count, shape.length, device))
        lengths = torch.zeros(count, dtype=torch.int32, device=device)
        cache = PackedCache(
            self._memory,
            table=torch.zeros(count, self._pages, dtype=torch.int32, device=device),
            lengths=lengths,
            slots=torch.full_like(lengths, NULL_SLOT),
            accepted=torch.zeros_like(lengths) if shape.has_accepted else None,
            steps=count,
        )
        call = Call(inputs, cache)
        if self._width is not None:
            hidden = torch.zeros(tokens, self._width, dtype=self._memory.keys.dtype, device=device)
            call = Call(inputs, cache, hidden, torch.arange(count, device=device) * shape.length)
        self._compute(call)  # compiles what the graph holds, and fills what `inputs` and `cache` keep
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: that of NCCL, which watches over collectives, asks for events at any time.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            states, logits = self._compute(call)
        return _Captured(graph, call, states, logits)


def is_graphable(batch: Batch) -> bool:
    """Whether a graph holds a batch: only steps, with as many tokens each."""
    segments = batch.inputs.segments
    return batch.cache.steps == segments.count and batch.cache.snapshots is None and segments.is_uniform


def rung_of(count: int, most: int) -> int:
    """The least rung that holds `count` sequences; `most` is the last one."""
    octave = 1 << max(0, (count - 1).bit_length() - 1)
    step = max(1, octave // RUNGS_PER_OCTAVE)
    return min(most, -(-count // step) * step)


def _pairs(own: Call, given: Call) -> list[tuple[Tensor, Tensor, int | None]]:
    """What a graph reads, what it is to read, and the same of a null sequence where that matters."""
    assert own.inputs.token_ids is not None
    assert given.inputs.token_ids is not None
    pairs: list[tuple[Tensor, Tensor, int | None]] = [
        (own.inputs.token_ids, given.inputs.token_ids, None),
        (own.inputs.positions, given.inputs.positions, None),
        (own.cache.lengths, given.cache.lengths, 0),
        (own.cache.slots, given.cache.slots, NULL_SLOT),
    ]
    if own.cache.accepted is not None and given.cache.accepted is not None:
        pairs.append((own.cache.accepted, given.cache.accepted, 0))
    if own.hidden is not None and given.hidden is not None:
        pairs.append((own.hidden, given.hidden, None))
    if own.rows is not None and given.rows is not None:
        pairs.append((own.rows, given.rows, 0))
    return pairs

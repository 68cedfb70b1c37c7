"""Decoding and verification as CUDA graphs: one launch for a whole call of the network."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.engine.batch import Batch
from qwen3_next.model.bare import BareCausalLM
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
class _Captured:
    """A graph with what it reads and writes, in tensors that stay where they are."""

    graph: torch.cuda.CUDAGraph
    inputs: PackedInputs
    cache: PackedCache
    hidden: Float[Tensor, "T D"]
    logits: Float[Tensor, "T V"]


class Graphs:
    """The network on sequences that all bring the same few tokens, captured for a ladder of batch sizes.

    A batch is filled up to the next rung with null sequences, which read and write nothing. Graphs share the memory of
    what happens inside them.
    """

    def __init__(self, model: BareCausalLM, memory: PackedMemory, *, most: int, pages: int) -> None:
        """Capture decoding at every rung; verification is captured when it is first asked for.

        Args:
            most: sequences of a call.
            pages: of one sequence.
        """
        self._model, self._memory, self._most, self._pages = model, memory, most, pages
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Shape, _Captured] = {}
        for rung in sorted({rung_of(count, most) for count in range(1, most + 1)}, reverse=True):  # the largest first,
            self._get(Shape(rung, 1, has_accepted=False))  # whose memory then serves all

    def run(self, batch: Batch) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T V"]] | None:
        """Hidden states and logits of all tokens; None for a batch that no graph can hold."""
        shape = shape_of(batch, self._most)
        if shape is None:
            return None
        captured, count, tokens = self._get(shape), batch.inputs.segments.count, batch.inputs.segments.total
        own, given = captured.cache, batch.cache
        assert captured.inputs.token_ids is not None
        assert batch.inputs.token_ids is not None
        captured.inputs.token_ids[:tokens] = batch.inputs.token_ids
        captured.inputs.positions[:tokens] = batch.inputs.positions
        own.table[:count, : given.table.shape[1]] = given.table
        for mine, theirs, null in _per_sequence(own, given):
            mine[:count] = theirs
            mine[count:] = null
        captured.graph.replay()
        return captured.hidden[:tokens].clone(), captured.logits[:tokens]  # states may be read after the next call

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
        self._compute(inputs, cache)  # compiles what the graph holds, and fills what `inputs` and `cache` keep
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: that of NCCL, which watches over collectives, asks for events at any time.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden, logits = self._compute(inputs, cache)
        return _Captured(graph, inputs, cache, hidden, logits)

    def _compute(self, inputs: PackedInputs, cache: PackedCache) -> tuple[Tensor, Tensor]:
        hidden = self._model.model(inputs, cache)
        return hidden, self._model.lm_head(hidden)


def shape_of(batch: Batch, most: int) -> Shape | None:
    """What graph holds a batch: only steps, with as many tokens each, all of whose logits are wanted; else None."""
    segments = batch.inputs.segments
    is_step = batch.cache.steps == segments.count and batch.cache.snapshots is None
    if not is_step or not segments.is_uniform or len(batch.rows) != segments.total:
        return None
    return Shape(rung_of(segments.count, most), segments.max_length, batch.cache.accepted is not None)


def rung_of(count: int, most: int) -> int:
    """The least rung that holds `count` sequences; `most` is the last one."""
    octave = 1 << max(0, (count - 1).bit_length() - 1)
    step = max(1, octave // RUNGS_PER_OCTAVE)
    return min(most, -(-count // step) * step)


def _per_sequence(own: PackedCache, given: PackedCache) -> list[tuple[Int[Tensor, "N"], Int[Tensor, "N"], int]]:
    """What a graph reads, what it is to read, and the same of a null sequence."""
    pairs = [(own.lengths, given.lengths, 0), (own.slots, given.slots, NULL_SLOT)]
    if own.accepted is not None and given.accepted is not None:
        pairs.append((own.accepted, given.accepted, 0))
    return pairs

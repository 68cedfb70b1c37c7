"""Runs plans on the network: memory prepared, tokens through all layers, logits of the rows that are wanted."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qwen3_next.engine.batch import Batch, prepare_memory_
from qwen3_next.engine.config import Division
from qwen3_next.engine.graphs import Call, Graphs, is_graphable
from qwen3_next.engine.plan import Plan
from qwen3_next.engine.prompt_logprobs import prompt_scores
from qwen3_next.engine.sampler import Choice, Drawn
from qwen3_next.errors import BackendError
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.packed_cache import PackedMemory


@dataclass(frozen=True, eq=False)
class Computed:
    """What came of a call.

    Attributes:
        hidden: of every packed token, after the final norm.
        logits: of `batch.rows`.
        prompt_scores: by request id, the log-probabilities of prompt tokens that this call's chunks gave.
    """

    batch: Batch
    hidden: Float[Tensor, "T D"]
    logits: Float[Tensor, "R V"]
    prompt_scores: Mapping[str, tuple[Drawn, ...]]


class Runner:
    """The network and the tensors behind pages and slots.

    Attributes:
        graphs: of decoding and verification; None on a CPU.
        is_uniform: whether all steps of a call bring as many tokens, as graphs want it.
    """

    def __init__(self, model: BareCausalLM, division: Division, known: int) -> None:
        """Allocate the memory, and capture graphs on a GPU.

        Args:
            known: where the ids begin that only fill up the head.

        Raises:
            BackendError: the device has not enough memory beside that of keys and states.
        """
        weight = model.lm_head.weight
        self.model, self.known = model, known
        self.memory = PackedMemory.allocate(
            model.config,
            pages=division.pages,
            slots=division.slots,
            pending=division.pending,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.graphs = self._capture(division) if weight.is_cuda else None
        self.is_uniform = weight.is_cuda

    @torch.inference_mode()
    def run(self, plan: Plan, earlier: Choice | None = None) -> Computed:
        """Compute what a plan asks for; `earlier` is what the call before chooses, if the host does not know it yet."""
        prepare_memory_(plan, self.memory)
        batch = Batch.build(plan, self.memory, earlier, is_uniform=self.is_uniform)
        if self.graphs is not None and is_graphable(batch):
            hidden, logits = self.graphs.run(Call(batch.inputs, batch.cache))
            is_whole = len(batch.rows) == len(logits)
            return Computed(batch, hidden, logits if is_whole else logits[batch.rows], {})  # chunks alone have prompts
        hidden = self.model.model(batch.inputs, batch.cache)
        scores = prompt_scores(hidden, plan, self.model.lm_head, self.known)
        return Computed(batch, hidden, self.model.lm_head(hidden[batch.rows]), scores)

    def _capture(self, division: Division) -> Graphs:
        limits = division.limits
        graphs = Graphs(self._compute, self.memory, most=limits.max_sequences, pages=division.pages_of_a_sequence)
        try:
            graphs.capture(1, has_accepted=False)
            return graphs
        except torch.OutOfMemoryError as error:
            raise BackendError(
                f"the graphs of calls with up to {limits.max_sequences} sequences do not fit {self.memory.keys.device} "
                f"beside memory_bytes = {limits.memory_bytes} of keys and states; lower one of the two."
            ) from error

    def _compute(self, call: Call) -> tuple[Tensor, Tensor]:
        hidden = self.model.model(call.inputs, call.cache)
        return hidden, self.model.lm_head(hidden)

"""Runs plans on the network: memory prepared, tokens through all layers, logits of the rows that are wanted."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qwen3_next.engine.batch import Batch, prepare_memory_
from qwen3_next.engine.config import Division
from qwen3_next.engine.plan import Plan
from qwen3_next.engine.prompt_logprobs import prompt_scores
from qwen3_next.engine.sampler import Drawn
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
    """The network and the tensors behind pages and slots."""

    def __init__(self, model: BareCausalLM, division: Division, known: int) -> None:
        """Allocate the memory; `known` is where the ids begin that only fill up the head."""
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

    @torch.inference_mode()
    def run(self, plan: Plan) -> Computed:
        """Compute what a plan asks for."""
        prepare_memory_(plan, self.memory)
        batch = Batch.build(plan, self.memory)
        hidden = self.model.model(batch.inputs, batch.cache)
        scores = prompt_scores(hidden, plan, self.model.lm_head, self.known)
        return Computed(batch, hidden, self.model.lm_head(hidden[batch.rows]), scores)

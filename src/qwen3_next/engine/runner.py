"""Runs plans on the network: memory prepared, tokens through all layers, logits of the rows that are wanted."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qwen3_next.engine.batch import Batch, prepare_memory_
from qwen3_next.engine.config import Division
from qwen3_next.engine.plan import Plan
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.packed_cache import PackedMemory


@dataclass(frozen=True, eq=False)
class Computed:
    """What a call of the network gave.

    Attributes:
        hidden: of every packed token, after the final norm.
        logits: of `batch.rows`.
    """

    batch: Batch
    hidden: Float[Tensor, "T D"]
    logits: Float[Tensor, "R V"]


class Runner:
    """The network and the tensors behind pages and slots."""

    def __init__(self, model: BareCausalLM, division: Division) -> None:
        weight = model.lm_head.weight
        self.model = model
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
        return Computed(batch, hidden, self.model.lm_head(hidden[batch.rows]))

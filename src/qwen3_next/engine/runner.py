"""Runs plans on the network: memory prepared, tokens through all layers, logits of the rows that are wanted."""

import torch
from jaxtyping import Float
from torch import Tensor

from qwen3_next.engine.batch import Batch, prepare_memory_
from qwen3_next.engine.config import Division
from qwen3_next.engine.plan import Plan
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.packed_cache import PackedMemory


class Runner:
    """The network and the tensors behind pages and slots."""

    def __init__(self, model: BareCausalLM, division: Division) -> None:
        weight = model.lm_head.weight
        self.model = model
        self.memory = PackedMemory.allocate(
            model.config,
            pages=division.pages,
            slots=division.slots,
            dtype=weight.dtype,
            device=weight.device,
        )

    @torch.inference_mode()
    def run(self, plan: Plan) -> tuple[Batch, Float[Tensor, "R V"]]:
        """Compute what a plan asks for; the logits are those of `Batch.rows`."""
        prepare_memory_(plan, self.memory)
        batch = Batch.build(plan, self.memory)
        hidden = self.model.model(batch.inputs, batch.cache)
        return batch, self.model.lm_head(hidden[batch.rows])

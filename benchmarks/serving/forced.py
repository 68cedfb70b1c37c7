"""Test hooks around the engine: contexts that nobody read, and drafts that a seeded coin accepts."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random

import torch
from torch import Tensor

import qwen3_next.engine.engine as engine_module
from qwen3_next.engine import Engine
from qwen3_next.engine.sampler import Drawn
from qwen3_next.engine.speculative import verify
from qwen3_next.model import PackedCache, PackedInputs


@contextmanager
def unread_prompts(engine: Engine) -> Generator[None, None, None]:
    """Prompts are planned and get pages, and the network leaves them out: its answer is random states.

    When the block ends, pages and slots hold random keys, values and states: steps cost what they cost after prompts
    that were read.
    """
    network, scheduler = engine.loaded.model.model, engine.scheduler
    whole, limits = network.forward, scheduler.config
    if engine.drafter is None:  # all in one call, or the first streams would end before the last begin
        scheduler.config = replace(limits, token_budget=limits.max_sequences * limits.max_context)

    def skipping(inputs: PackedInputs, cache: PackedCache) -> Tensor:
        if cache.steps == inputs.segments.count:
            return whole(inputs, cache)
        head = engine.loaded.model.lm_head.weight
        # Rows that overlap: as random as others where they are wanted, far apart, and small for any number of tokens.
        values = torch.randn(inputs.segments.total + head.shape[1] - 1, dtype=head.dtype, device=head.device)
        return values.unfold(0, head.shape[1], 1)

    network.forward = skipping  # type: ignore[method-assign]
    try:
        yield
    finally:
        del network.forward
        scheduler.config = limits
    memory = engine.runner.memory
    for kept, spread in ((memory.keys, 1.0), (memory.values, 1.0), (memory.recurrent, 0.05), (memory.conv, 0.5)):
        kept.normal_(0, spread)


@dataclass
class Coin:
    """What became of drafts under a forced rate."""

    proposed: int = 0
    accepted: int = 0


@contextmanager
def forced_acceptance(rate: float, seed: int = 0) -> Generator[Coin, None, None]:
    """Each draft is accepted with this probability if all before it were, whatever the network says."""
    random, coin = Random(seed), Coin()

    def forced(rows: Sequence[Drawn], drafts: Sequence[int]) -> tuple[Drawn, ...]:
        accepted = list[Drawn]()
        for one, draft in zip(rows, drafts, strict=False):
            is_accepted = random.random() < rate
            coin.proposed += 1
            coin.accepted += is_accepted
            if not is_accepted:
                return (*accepted, one)
            accepted.append(replace(one, token=draft))
        return (*accepted, rows[len(drafts)])

    if engine_module.verify is not verify:
        raise RuntimeError("the engine's verdict is elsewhere than this hook replaces it")
    engine_module.verify = forced
    try:
        yield coin
    finally:
        engine_module.verify = verify

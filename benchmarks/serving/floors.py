"""The least time that a card allows for a call of the engine, from the bytes and FLOPs of that very call."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.alone import weights_read
from benchmarks.operations.measure import Rates
from torch import nn

from qwen3_next.engine import Engine
from qwen3_next.model import PackedMemory
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.moe import Router
from qwen3_next.ops.pages import PAGE


@dataclass(frozen=True)
class Rows:
    """What a step reads and writes.

    Attributes:
        contexts: tokens before the step, of each sequence.
        drafts: of each; they are verified in the step, and as many are made.
        experts: the mean number of distinct experts of a layer; None for the number expected of uniform routing.
    """

    contexts: Sequence[int]
    drafts: int = 0
    experts: float | None = None


def step_bytes(model: BareCausalLM, rows: Rows) -> float:
    """What a step must move: weights of the experts it wakes, head, states (read and written), keys and values.

    Each draft reads the MTP layer and the head once more.
    """
    config, streams = model.config, len(rows.contexts)
    head = model.lm_head.weight
    one = PackedMemory.allocate(config, pages=1, slots=1, dtype=head.dtype, device="meta")
    states = 2 * (one.recurrent.nbytes + one.conv.nbytes)
    keys = (one.keys.nbytes + one.values.nbytes) / PAGE
    tokens = streams * (1 + rows.drafts)
    moved = network_bytes(model.model.layers, config, tokens, rows.experts) + head.nbytes
    moved += streams * states + sum(rows.contexts) * keys + tokens * keys
    if rows.drafts:
        assert model.mtp is not None
        keys_of_mtp = keys / max(1, list(config.layer_types).count("full_attention"))
        for link in range(rows.drafts):  # the first call reads what was committed, the others one token each
            read = tokens if link == 0 else streams
            moved += network_bytes([model.mtp], config, read, None) + head.nbytes
            moved += sum(rows.contexts) * keys_of_mtp
    return moved


def network_bytes(layers: Any, config: Any, tokens: int, experts: float | None) -> float:
    """Of the weights that so many tokens read."""
    share = config.num_experts_per_tok / config.num_experts
    hit = 1 - (1 - share) ** tokens if experts is None else experts / config.num_experts
    total = 0.0
    for layer in layers:
        for name, weight in layer.state_dict().items():
            total += (hit if ".experts." in f".{name}" else 1.0) * weight.nbytes
    return total


def prompt_seconds(model: BareCausalLM, length: int, rates: Rates, is_fp8: bool) -> float:
    """The products with weights at one rate, attention at that of bf16."""
    config = model.config
    pairs = length * (length + 1) / 2
    layers = list(config.layer_types).count("full_attention")
    attention = 4.0 * pairs * config.num_attention_heads * config.head_dim * layers
    products = 2.0 * length * weights_read(model, length)[1]  # type: ignore[arg-type] - layers and config are all it asks
    return products / (rates.fp8 if is_fp8 else rates.bf16) + attention / rates.bf16


@contextmanager
def counted_experts(engine: Engine) -> Generator[list[int], None, None]:
    """How many distinct experts each layer wakes in each call inside the block, which runs without graphs."""
    found, graphs = list[int](), engine.runner.graphs

    def count(_: nn.Module, __: Any, routing: Any) -> None:
        found.append(int(torch.unique(routing.experts).numel()))

    routers = [module for module in engine.loaded.model.model.modules() if isinstance(module, Router)]
    handles = [router.register_forward_hook(count) for router in routers]
    engine.runner.graphs = None
    try:
        yield found
    finally:
        engine.runner.graphs = graphs
        for handle in handles:
            handle.remove()

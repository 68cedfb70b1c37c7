"""Both models in bf16 on one card: prompts and steps with fewer layers, scaled to all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks import alone
from benchmarks.claim import dense
from benchmarks.claim.rows import FULL, ONE, PREFILL, Row
from benchmarks.serving.setting import LAYERS, decide_
from torch import Tensor, nn

from qwen3_next import Qwen3NextConfig
from qwen3_next.engine.config import sizes
from qwen3_next.ops import linear_argmax
from qwen3_next.ops.pages import PAGE

Speeds = dict[tuple[str, int], float]
"""Tokens per second of the whole model by work and context."""


class DifferenceError(Exception):
    """A layer computes something else than its definition."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured.

    Attributes:
        card_bytes: of the card whose memory says how many streams fit.
        room: share of it that weights, keys and states may take.
        chunk: tokens of a prompt that ours reads in one call.
        slow: seconds from which a call is not repeated.
    """

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    ours: dict[str, Any] = field(default_factory=lambda: alone.PUBLISHED)
    theirs: dict[str, Any] = field(default_factory=lambda: dense.QWEN3_32B)
    layers: tuple[int, int] = (8, 16)
    contexts: tuple[int, ...] = (4_096, 16_384, 32_768, 65_536, 131_072)
    card_bytes: float = 141e9
    room: float = 0.95
    chunk: int = 32_768
    repeats: int = 5
    slow: float = 4.0


@torch.inference_mode()
def measured(setup: Setup) -> Iterator[Row]:
    """The rows of both models, when the second was measured.

    Raises:
        DifferenceError: nothing was timed.
    """
    fitting = {context: streams(setup, context) for context in setup.contexts}
    ours = our_speeds(setup, {context: both[0] for context, both in fitting.items()})
    gc.collect()
    if setup.device != "cpu":
        torch.cuda.empty_cache()
    theirs = their_speeds(setup, {context: both[1] for context, both in fitting.items()})
    for work in (PREFILL, FULL, ONE):
        for context in setup.contexts:
            counts = fitting[context] if work == FULL else (1, 1)
            yield Row(
                work=work, context=context, streams=counts, ours=ours[work, context], dense=theirs[work, context],
                is_fp8=False,
            )  # fmt: skip


def streams(setup: Setup, context: int) -> tuple[int, int]:
    """How many sequences of so many tokens the card holds beside the whole models' fp8 weights, of ours and theirs;
    keys and values of both in bf16, our states in fp32."""
    config = Qwen3NextConfig(**setup.ours, num_hidden_layers=LAYERS, num_nextn_predict_layers=0)
    page, slot = sizes(config, torch.bfloat16)
    whole = setup.card_bytes * setup.room
    ours = (whole - config.weight_bytes("fp8")) / (-(-context // PAGE) * page + slot)
    keys = dense.key_bytes(setup.theirs, dense.LAYERS)
    theirs = (whole - dense.weight_bytes(setup.theirs, dense.LAYERS)) / (context * keys)
    return max(1, int(ours)), max(1, int(theirs))


def our_speeds(setup: Setup, fitting: dict[int, int]) -> Speeds:
    model = alone.random_model(setup.ours, setup.device, fp8=False, dtype=setup.dtype, layers=setup.layers[0])
    require_definitions(model)
    decide_(model)
    weight = model.lm_head.weight

    def head(rows: int) -> Callable[[], Tensor]:
        states = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
        return lambda: linear_argmax(states, weight)

    def prompt(length: int) -> Callable[[], Tensor]:
        batch, news = alone.Batch(model, 1, length), [setup.chunk] * (length // setup.chunk)
        news += [length % setup.chunk] * (length % setup.chunk > 0)
        calls = [batch.call([count]) for count in news]
        return lambda: linear_argmax([call() for call in calls][-1][-1:], weight)

    def step(count: int, context: int) -> Callable[[], Tensor]:
        return alone.step(model, count, context)

    return speeds(setup, LAYERS / setup.layers[0], prompt, step, head, fitting)


def require_definitions(model: Any) -> None:
    """Compare one pattern of layers; copies of more in fp32 would not fit beside the model."""
    layers = model.model.layers
    model.model.layers = nn.ModuleList(list(layers)[: alone.PATTERN])
    worst = max(one.ratio for one in alone.differences(model))
    model.model.layers = layers
    if not worst <= alone.TOLERANCE:
        raise DifferenceError(
            f"a layer is {worst:.2f} times as far from fp32 as its definition; {alone.TOLERANCE} allowed"
        )


def their_speeds(setup: Setup, fitting: dict[int, int]) -> Speeds:
    model = dense.dense_model(setup.theirs, setup.layers[1], setup.device, setup.dtype)

    def head(rows: int) -> Callable[[], Tensor]:
        states = torch.randn(rows, model.config.hidden_size, dtype=setup.dtype, device=model.device)
        return lambda: model.lm_head(states).argmax(-1)

    def prompt(length: int) -> Callable[[], Tensor]:
        return dense.prompt(model, length)

    def step(count: int, context: int) -> Callable[[], Tensor]:
        return dense.step(model, count, context)

    return speeds(setup, dense.LAYERS / setup.layers[1], prompt, step, head, fitting)


def speeds(
    setup: Setup,
    factor: float,
    prompt: Callable[[int], Callable[[], object]],
    step: Callable[[int, int], Callable[[], object]],
    head: Callable[[int], Callable[[], object]],
    fitting: dict[int, int],
) -> Speeds:
    """Of one model; its layers' time is multiplied, its head's is not. Steps and heads are CUDA graphs on a GPU."""
    found: Speeds = {}

    def whole(call: Callable[[], object], rows: int) -> float:
        of_head = seconds(setup, graph(setup, head(rows)))
        return (seconds(setup, call) - of_head) * factor + of_head

    for context in setup.contexts:
        found[PREFILL, context] = context / whole(prompt(context), 1)
        for work, count in ((FULL, fitting[context]), (ONE, 1)):
            found[work, context] = count / whole(graph(setup, step(count, context)), count)
            gc.collect()
    return found


def graph(setup: Setup, call: Callable[[], object]) -> Callable[[], object]:
    return call if setup.device == "cpu" else alone.replayed(call)


def seconds(setup: Setup, call: Callable[[], object]) -> float:
    """The median after a call that warms up; of a slow one there is one more."""
    begin = time.perf_counter()
    call()
    if setup.device != "cpu":
        torch.cuda.synchronize()
    repeats = 1 if time.perf_counter() - begin > setup.slow else setup.repeats
    return statistics.median(once(setup, call) for _ in range(repeats))


def once(setup: Setup, call: Callable[[], object]) -> float:
    if setup.device == "cpu":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3

"""The rows of the benchmark on a GPU: each measures its work on an engine of its own limits."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from benchmarks.operations.measure import Rates
from benchmarks.serving import floors
from benchmarks.serving.forced import forced_acceptance, unread_prompts
from benchmarks.serving.setting import (
    LAYERS,
    Setting,
    added,
    automatic,
    first_token,
    fixed,
    stopped,
    synchronize,
    timed_steps,
    until_all_decode,
)
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qwen3_next.engine import Engine
from qwen3_next.engine.draft_policy import TRIAL

PEERS = {
    "prefill 4,096": "vLLM 37.2k tok/s; goals 50k, 80k",
    "prefill 32,768": "vLLM 44.4k tok/s; goals 58k, 84k",
    "prefill 131,072": "vLLM 27.1k tok/s; goals 30k, 33.4k",
    "decode 1, context 1,024": "vLLM 194 tok/s; goals 300, 600",
    "decode 16, context 1,024": "vLLM 1,480 tok/s; goals 2,000, 2,300",
    "decode 64, context 1,024": "vLLM 3,207 tok/s; goals 3,400, 3,700",
    "decode 256, context 1,024": "vLLM 7,038 tok/s; goals 7,500, 8,500",
    "decode 1, context 32,768": "vLLM 184 tok/s; goals 280, 550",
    "decode at 32,768, as many as fit": "vLLM 2,007 tok/s of 63; goals 2,100, 2,250",
    "step with 2 drafts, 1": "vLLM 9.3 ms, 1.80 x its plain step; goal 1.5 x its own floor",
    "step with 2 drafts, 16": "vLLM 26.1 ms, 2.41 x its plain step; goal 1.3 x its own floor",
    "start-up, cold": "vLLM 140 s to ready; goal 60 s",
    "start-up, warm": "vLLM 51 s to ready; goal 20 s",
}
"""Of another run: fp8, 48 layers, one H200."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    prompts: tuple[int, ...] = (4_096, 32_768, 131_072)
    context: int = 1_024
    streams: tuple[int, ...] = (1, 16, 64, 256)
    long: int = 32_768
    drafted: tuple[int, ...] = (1, 16)
    forced: tuple[int, ...] = (1, 8, 64)
    rates: tuple[float, ...] = (0.0, 0.5, 0.7, 0.9)
    hosted: int = 64
    steps: int = 24
    repeats: int = 2
    token_budget: int = 8_192


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement.

    Attributes:
        tokens: of the call.
        seconds: of the call, at 48 layers; None where `note` says it all.
        floor, floor_seen: seconds with the expected number of distinct experts, and with that of a step of this run.
        is_scaled: both were measured with fewer layers and multiplied.
    """

    work: str
    tokens: int = 0
    seconds: float | None = None
    floor: float | None = None
    floor_seen: float | None = None
    is_scaled: bool = False
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict[str, float])

    @property
    def record(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        """One line of the report."""
        parts = [f"{self.work:34}"]
        if self.seconds is not None:
            parts.append(f"{self.seconds * 1e3:10.2f} ms {self.tokens / self.seconds:10,.0f} tok/s")
        for name, floor in (("floor", self.floor), ("with its experts", self.floor_seen)):
            if floor is not None and self.seconds is not None:
                parts.append(f"{name} {floor * 1e3:.2f} ms ({self.seconds / floor:.2f} x)")
        parts += [self.note] * bool(self.note) + ["SCALED to 48 layers"] * self.is_scaled
        if self.work in PEERS:
            parts.append(f"[another run: {PEERS[self.work]}]")
        return "  ".join(parts)


@dataclass(eq=False)
class Bench:
    """What all rows use."""

    setting: Setting
    rates: Rates
    sizes: Sizes
    is_fp8: bool

    @property
    def factor(self) -> float:
        """By what the time of the layers is multiplied."""
        return LAYERS / len(self.setting.loaded.model.model.layers)

    def bytes_seconds(self, rows: floors.Rows) -> float:
        model = self.setting.loaded.model
        head = model.lm_head.weight.nbytes
        return ((floors.step_bytes(model, rows) - head) * self.factor + head) / self.rates.read

    def scaled(self, seconds: float, head: float) -> float:
        return (seconds - head) * self.factor + head

    def row(self, work: str, seconds: float, contexts: list[int], seen: float | None, head: float) -> Row:
        """Of a plain step."""
        return Row(
            work=work,
            tokens=len(contexts),
            seconds=self.scaled(seconds, head),
            floor=self.bytes_seconds(floors.Rows(contexts)),
            floor_seen=None if seen is None else self.bytes_seconds(floors.Rows(contexts, experts=seen)),
            is_scaled=self.factor != 1,
        )


def prefill(bench: Bench) -> Iterator[Row]:
    sizes, setting = bench.sizes, bench.setting
    engine = setting.engine(
        max_sequences=1, max_context=max(sizes.prompts) + 64, drafts=0, token_budget=sizes.token_budget
    )
    for length in sizes.prompts:
        times = list[float]()
        for _ in range(1 + sizes.repeats):
            engine.scheduler.memory.evict_all()
            times.append(first_token(engine, setting.prompt(length))[0])
        head = head_seconds(engine, 1)
        floor = floors.prompt_seconds(setting.loaded.model, length, bench.rates, bench.is_fp8) * bench.factor
        yield Row(
            work=f"prefill {length:,}",
            tokens=length,
            seconds=bench.scaled(statistics.median(times[1:]), head),
            floor=floor,
            is_scaled=bench.factor != 1,
        )


def decode(bench: Bench) -> Iterator[Row]:
    sizes = bench.sizes
    room = 2 * sizes.steps + 64
    engine = bench.setting.engine(
        max_sequences=max(sizes.streams), max_context=sizes.context + room, drafts=0, token_budget=sizes.token_budget
    )
    for streams in sizes.streams:
        yield plain_steps(bench, engine, f"decode {streams}, context {sizes.context:,}", streams, sizes.context)


def long(bench: Bench) -> Iterator[Row]:
    sizes, context = bench.sizes, bench.sizes.long
    engine = bench.setting.engine(
        max_sequences=max(sizes.streams),
        max_context=context + 2 * sizes.steps + 64,
        drafts=0,
        token_budget=sizes.token_budget,
    )
    yield plain_steps(bench, engine, f"decode 1, context {context:,}", 1, context)
    most = fitting(engine, context + 2 * sizes.steps + 64)
    yield plain_steps(bench, engine, f"decode at {context:,}, as many as fit", most, context)


def plain_steps(bench: Bench, engine: Engine, work: str, streams: int, context: int) -> Row:
    """Steps behind contexts of random keys; fewer streams where no more fit."""
    sizes = bench.sizes
    asked, streams = streams, min(streams, engine.division.limits.max_sequences)
    names = filled(bench, engine, streams, context, 2 * sizes.steps + 40)
    steps = timed_steps(engine, 4, sizes.steps)
    with floors.counted_experts(engine) as woken:
        timed_steps(engine, 0, 1)
    stopped(engine, names)
    seen = statistics.fmean(woken) if woken else None
    row = bench.row(
        work, steps.seconds, [context + 4 + sizes.steps // 2] * streams, seen, head_seconds(engine, streams)
    )
    note = f"{streams} streams" + (f" of {asked}: no more fit" if streams < asked else "")
    note += "" if seen is None else f", {seen:.0f} experts woken a layer"
    return replace(row, note=note)


def drafts(bench: Bench) -> Iterator[Row]:
    """With two, beside the plain step; then with a coin for a verdict, the engine choosing how many."""
    sizes = bench.sizes
    most = max(*sizes.drafted, *sizes.forced)
    tokens = 4 * (sizes.steps + 8) * (engine_drafts := 4) + 4 * (3 * sizes.steps + 40)
    engine = bench.setting.engine(
        max_sequences=most, max_context=sizes.context + tokens, drafts="auto", token_budget=sizes.token_budget
    )
    assert engine.division.drafts < engine_drafts
    for streams in sizes.drafted:
        yield two_drafts(bench, engine, streams, tokens)
    for streams in sizes.forced:
        costs = step_costs(bench, engine, streams, tokens)
        for rate in sizes.rates:
            yield forced(bench, engine, streams, rate, costs, tokens)


def two_drafts(bench: Bench, engine: Engine, streams: int, tokens: int) -> Row:
    sizes = bench.sizes
    names = filled(bench, engine, streams, sizes.context, tokens - 8)
    fixed(engine, 0)
    plain = timed_steps(engine, 4, sizes.steps).seconds
    fixed(engine, 2)
    with forced_acceptance(0.5):
        drafted = timed_steps(engine, 6, sizes.steps).seconds
    stopped(engine, names)
    model = bench.setting.loaded.model
    contexts = [sizes.context + 2 * sizes.steps] * streams
    floor, plain_floor = (floors.step_bytes(model, floors.Rows(contexts, k)) / bench.rates.read for k in (2, 0))
    return Row(
        work=f"step with 2 drafts, {streams}",
        tokens=streams,
        seconds=drafted,
        floor=floor,
        note=(
            f"{drafted / plain:.2f} x the plain step of {plain * 1e3:.2f} ms ({plain / plain_floor:.2f} x its floor), "
            f"{len(model.model.layers)} layers as they are, independent routing"
        ),
        figures={"plain": plain, "plain_floor": plain_floor},
    )


def step_costs(bench: Bench, engine: Engine, streams: int, tokens: int) -> dict[int, float]:
    """Seconds of a step by drafts."""
    names, costs = filled(bench, engine, streams, bench.sizes.context, tokens - 8), dict[int, float]()
    with forced_acceptance(0.5):
        for count in range(engine.division.drafts + 1):
            fixed(engine, count)
            costs[count] = timed_steps(engine, 6, bench.sizes.steps).seconds
    stopped(engine, names)
    return costs


def forced(bench: Bench, engine: Engine, streams: int, rate: float, costs: dict[int, float], tokens: int) -> Row:
    names = filled(bench, engine, streams, bench.sizes.context, tokens - 8)
    automatic(engine)
    with forced_acceptance(rate) as coin:
        found = timed_steps(engine, TRIAL * (engine.division.drafts + 1) + 32, 2 * bench.sizes.steps)
    chosen = engine.drafts.choose(streams)
    stopped(engine, names)
    off = streams / costs[0]
    gains = {k: sum(rate**i for i in range(k + 1)) * costs[0] / cost for k, cost in costs.items()}
    best = max(gains, key=gains.__getitem__)
    share = coin.accepted / max(coin.proposed, 1)
    if coin.proposed >= 200 and abs(share - rate) > 0.15:
        raise RuntimeError(f"the coin accepted {share:.2f} of the drafts, not {rate}: the hook misses the verdict")
    return Row(
        work=f"drafts at {rate:.0%}, {streams} streams",
        note=(
            f"{found.speed:,.0f} tok/s, {found.speed / off:.2f} x off ({off:,.0f}); the engine chose {chosen} drafts; "
            f"best {gains[best]:.2f} x with {best} (steps "
            f"{', '.join(f'{cost * 1e3:.2f}' for cost in costs.values())} ms); independent routing"
        ),
        figures={"ratio": found.speed / off, "best": gains[best], "accepted": share, "proposed": coin.proposed},
    )


def host(bench: Bench) -> Iterator[Row]:
    """The part of a step in which the device has nothing to do."""
    sizes = bench.sizes
    engine = bench.setting.engine(
        max_sequences=sizes.hosted, max_context=sizes.context + 4 * sizes.steps + 64, drafts=0,
        token_budget=sizes.token_budget,
    )  # fmt: skip
    streams = min(sizes.hosted, engine.division.limits.max_sequences)
    names = filled(bench, engine, streams, sizes.context, 4 * sizes.steps + 40)
    wall = timed_steps(engine, 4, sizes.steps).seconds
    if engine.loaded.device.type != "cuda":
        stopped(engine, names)
        yield Row(work=f"host, {streams} streams", note=f"{wall * 1e3:.2f} ms a step, all of it on the host")
        return
    busy = busy_seconds(lambda: timed_steps(engine, 0, sizes.steps)) / sizes.steps
    stopped(engine, names)
    yield Row(
        work=f"host, {streams} streams",
        note=f"{wall * 1e3:.2f} ms a step, device busy {busy * 1e3:.2f}, idle {(wall - busy) * 1e3:.2f}",
        figures={"wall": wall, "busy": busy},
    )


def busy_seconds(run: Callable[[], object]) -> float:
    """How long the device computed or copied, from its own clock; what runs side by side counts once."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.device_type == DeviceType.CUDA
    )
    busy, last = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    return busy / 1e6


def chat(bench: Bench) -> Iterator[Row]:
    """A second turn, from the prefix cache, and the first."""
    sizes, setting = bench.sizes, bench.setting
    engine = setting.engine(max_sequences=2, max_context=sizes.long + 512, drafts=0, token_budget=sizes.token_budget)
    shares, times = list[float](), list[tuple[float, float]]()
    for _ in range(1 + sizes.repeats):
        engine.scheduler.memory.evict_all()
        prompt = setting.prompt(sizes.long)
        cold, answer = first_token(engine, prompt, 16)
        warm, _ = first_token(engine, (*prompt, *answer, *setting.prompt(64)))
        shares.append(warm / cold)
        times.append((cold, warm))
    cold, warm = times[-1]
    yield Row(
        work=f"second turn of a chat of {sizes.long:,}",
        note=f"first token after {warm * 1e3:.1f} ms, {statistics.median(shares[1:]):.2%} of the cold {cold:.3f} s",
        figures={"cold": cold, "warm": warm},
    )


def filled(bench: Bench, engine: Engine, streams: int, context: int, tokens: int) -> list[str]:
    """Streams behind random contexts, all of which write."""
    with unread_prompts(engine):
        names = added(engine, [bench.setting.prompt(context) for _ in range(streams)], tokens)
        until_all_decode(engine, names)
    return names


def fitting(engine: Engine, length: int) -> int:
    """Sequences of so many tokens that the pages hold."""
    memory = engine.scheduler.memory
    return max(1, min(engine.division.limits.max_sequences, (memory.page_count - 2) // memory.pages_for(length)))


def head_seconds(engine: Engine, rows: int) -> float:
    """Of the head over so many states."""
    weight = engine.loaded.model.lm_head.weight
    states, times = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype), list[float]()
    with torch.inference_mode():
        for _ in range(10):
            synchronize(engine)
            start = time.perf_counter()
            engine.loaded.model.lm_head(states)
            synchronize(engine)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "prefill": prefill,
    "decode": decode,
    "long": long,
    "drafts": drafts,
    "host": host,
    "chat": chat,
}

"""How fast the engine is on this machine: streams that each ask again as soon as they were answered."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qwen3_next.engine import LLM, Engine, Request, SamplingParams
from qwen3_next.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the engine.

    Attributes:
        streams: requests at the same time.
        prompt_tokens: of each request; no two begin alike.
        output_tokens: of each request; nothing ends it before.
        rounds: requests of each stream, one after the other.
    """

    streams: int
    prompt_tokens: int
    output_tokens: int
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was measured.

    Attributes:
        prefill: prompt tokens per second, over the steps of the engine during which a request waited for its first
            token.
        decode: output tokens per second of all streams together, over the other steps; None where there was none.
        waits: seconds from the request to its first token.
    """

    prefill: float
    decode: float | None
    waits: Sequence[float]


def bench(llm: LLM, loads: Sequence[Load], name: str) -> Table:
    """Measure loads one after the other, with a progress bar on stderr.

    Raises:
        InputError: a request would be longer than the context.
    """
    engine, seen = llm.engine, Random(0)
    for load in loads:
        length, most = load.prompt_tokens + load.output_tokens, engine.loaded.config.context_length()
        if length > most:
            raise InputError(f"{length} tokens of prompt and output do not fit. Allowed: {most}. Ask for fewer.")
    table = Table(title=f"{name} on {engine.loaded.device}", caption=str(engine.division), show_edge=False)
    for column in ("streams", "prompt tokens/s", "output tokens/s", "median wait s", "longest wait s"):
        table.add_column(column, justify="right")
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=sum(load.streams * (load.rounds + 1) for load in loads))
        for load in loads:
            # What a shape costs when it comes for the first time is nobody's speed.
            measure(engine, Load(**vars(load) | {"rounds": 1}), seen, lambda: bar.advance(task))
            speed = measure(engine, load, seen, lambda: bar.advance(task))
            decode = "-" if speed.decode is None else f"{speed.decode:,.1f}"
            waits = f"{statistics.median(speed.waits):.3f}", f"{max(speed.waits):.3f}"
            table.add_row(str(load.streams), f"{speed.prefill:,.1f}", decode, *waits)
    return table


def measure(engine: Engine, load: Load, random: Random, ended: Callable[[], None]) -> Speed:
    """Run one load.

    Args:
        random: of the prompts.
        ended: is called after each request.
    """
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=load.output_tokens)
    known = engine.loaded.tokenizer.get_vocab_size()
    names = [f"bench-{number}" for number in range(load.streams * load.rounds)]
    left, open_, asked, waits = list(names), set[str](), dict[str, float](), list[float]()
    reading, writing, written = 0.0, 0.0, 0
    while left or open_:
        while left and len(open_) < load.streams:
            prompt = tuple(random.randrange(known) for _ in range(load.prompt_tokens))
            engine.add(Request(request_id=left[-1], prompt=prompt, params=params))
            asked[left[-1]] = time.perf_counter()
            open_.add(left.pop())
        is_reading, start = bool(asked), time.perf_counter()
        outputs = engine.step()
        now = time.perf_counter()
        if is_reading:
            reading += now - start
        else:
            writing += now - start
            written += sum(len(output.state.tokens) for output in outputs)
        for output in outputs:
            if output.state.error is not None:
                raise output.state.error
            if output.state.request_id in asked:
                waits.append(now - asked.pop(output.state.request_id))
            if output.state.finish is not None:
                open_.remove(output.state.request_id)
                ended()
    prompt_tokens = load.prompt_tokens * len(names)
    return Speed(prefill=prompt_tokens / reading, decode=written / writing if writing else None, waits=waits)

"""A random model of the published shapes with engines around it, and the calls whose time is measured."""

import gc
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from benchmarks.alone import PUBLISHED
from tokenizers import Tokenizer
from torch import nn

from qwen3_next import Qwen3NextConfig
from qwen3_next.engine import Engine, EngineConfig, Request, SamplingParams
from qwen3_next.engine.draft_policy import DraftPolicy
from qwen3_next.engine.loading import SHIPPED, LoadedModel
from qwen3_next.engine.parallel import ParallelEngine, Ranks
from qwen3_next.model.bare import BareCausalLM, Shard

LAYERS = 48
NUMBERS = itertools.count()


@torch.inference_mode()
def random_model(
    settings: dict[str, Any], layers: int, device: str, quantization: Any, dtype: str, shard: Shard | None = None
) -> LoadedModel:
    """Values of the initialisation, changed by `decide_`.

    Args:
        shard: leaves of the model what one of several ranks holds.
    """
    config = Qwen3NextConfig(**(PUBLISHED | settings), num_hidden_layers=layers, num_nextn_predict_layers=1)
    model = BareCausalLM.with_random_values(
        config, getattr(torch, dtype), torch.device(device), quantization=quantization, mtp=True, shard=shard
    )
    decide_(model)
    return LoadedModel(
        model, config, Tokenizer.from_file(str(SHIPPED / "tokenizer.json")), {}, None, torch.device(device)
    )


def decide_(model: nn.Module) -> None:
    """Embeddings that outweigh the first layers and routers that are decided: then rounding stays what it is in a
    trained model, and experts are chosen evenly."""
    config: Any = model.config
    for name, weight in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            weight.div_(config.initializer_range)
        elif name.endswith("mlp.gate.weight"):
            weight.mul_(5 / config.hidden_size**0.5 / config.initializer_range)


@dataclass(eq=False)
class Setting:
    """The model, and one engine at a time: the last one's memory is free before the next takes its own.

    Attributes:
        ranks: that hold the model together; None for one that is whole.
    """

    loaded: LoadedModel
    random: Random = field(default_factory=lambda: Random(0))
    ranks: Ranks | None = None
    _engine: Engine | None = None

    def engine(self, **limits: Any) -> Engine:
        self.close()
        config = EngineConfig(**limits)
        if self.ranks is None:
            self._engine = Engine(self.loaded, config)
        else:
            self._engine = ParallelEngine(self.loaded, config, self.ranks)
        return self._engine

    def close(self) -> None:
        self._engine = None
        gc.collect()
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()

    def prompt(self, length: int) -> tuple[int, ...]:
        known = min(self.loaded.tokenizer.get_vocab_size(), self.loaded.config.vocab_size)
        return tuple(self.random.randrange(known) for _ in range(length))


def added(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int, **params: Any) -> list[str]:
    """Queue greedy requests that only their length ends; return their names."""
    names = [f"bench-{next(NUMBERS)}" for _ in prompts]
    chosen = SamplingParams(temperature=0, ignore_eos=True, max_tokens=tokens, **params)
    for name, prompt in zip(names, prompts, strict=True):
        engine.add(Request(request_id=name, prompt=tuple(prompt), params=chosen))
    return names


def advance(engine: Engine) -> list[Any]:
    outputs = engine.step()
    for output in outputs:
        if output.state.error is not None:
            raise output.state.error
    return outputs


def until_all_decode(engine: Engine, names: Sequence[str]) -> None:
    """Steps until every request has its first token."""
    missing = set(names)
    while missing:
        missing -= {output.state.request_id for output in advance(engine) if output.state.tokens}


def until_done(engine: Engine) -> None:
    while engine.has_work:
        advance(engine)


def stopped(engine: Engine, names: Sequence[str]) -> None:
    for name in names:
        engine.abort(name)
    until_done(engine)
    engine.scheduler.memory.evict_all()


@dataclass(frozen=True)
class Steps:
    """Seconds of a step, the median of some, and the tokens per second of all of them together."""

    seconds: float
    speed: float


def timed_steps(engine: Engine, warm: int, count: int) -> Steps:
    """Of steps in which all streams write."""
    for _ in range(warm):
        advance(engine)
    synchronize(engine)
    times, tokens, start = list[float](), 0, time.perf_counter()
    for _ in range(count):
        before = time.perf_counter()
        outputs = advance(engine)
        times.append(time.perf_counter() - before)
        tokens += sum(len(output.state.tokens) for output in outputs)
    synchronize(engine)
    return Steps(statistics.median(times), tokens / (time.perf_counter() - start))


def first_token(engine: Engine, prompt: Sequence[int], tokens: int = 1) -> tuple[float, list[int]]:
    """Seconds to the first token, and all tokens of the answer."""
    synchronize(engine)
    start, first, answer = time.perf_counter(), None, list[int]()
    (name,) = added(engine, [prompt], tokens)
    while engine.has_work:
        for output in advance(engine):
            if output.state.request_id == name and output.state.tokens:
                first = first or time.perf_counter() - start
                answer += output.state.tokens
    assert first is not None
    return first, answer


def fixed(engine: Engine, drafts: int) -> None:
    """From the next step on so many drafts."""
    engine.drafts = DraftPolicy(engine.division.drafts, is_fixed=False)
    engine.drafts.choose = lambda _: drafts  # type: ignore[method-assign]


def automatic(engine: Engine) -> None:
    """A policy that has learnt nothing yet."""
    engine.drafts = DraftPolicy(engine.division.drafts, is_fixed=False)


def synchronize(engine: Engine) -> None:
    if engine.loaded.device.type == "cuda":
        torch.cuda.synchronize(engine.loaded.device)


def agreement(setting: Setting, tokens: int = 8, length: int = 70) -> float:
    """How far log-probabilities of one text in a batch are from those alone: root mean square, in units of how far
    those of random tokens are apart.

    Alone, its tokens come from steps; in the batch, others beside it are read and decoded, and it is read as a prompt.
    """
    prompt = setting.prompt(length)
    engine = setting.engine(max_sequences=4, max_context=4 * length, drafts=0, memory_bytes=None)
    (name,) = added(engine, [prompt], tokens, logprobs=0)
    alone: list[float] = []
    text = list(prompt)
    while engine.has_work:
        for output in advance(engine):
            alone += [one.logprob for one in output.logprobs if one.logprob is not None]
            text += output.state.tokens
    engine.scheduler.memory.evict_all()
    names = added(engine, [setting.prompt(length // 2 + n) for n in range(2)], 4 * tokens)
    until_all_decode(engine, names)
    (name,) = added(engine, [text], 1, prompt_logprobs=0)
    read: list[float] = []
    while engine.has_work:
        for output in advance(engine):
            if output.state.request_id == name:
                read += [one.logprob for one in output.prompt_logprobs if one.logprob is not None]
    spread = statistics.pstdev(read[: length - 1])
    error = statistics.fmean((a - b) ** 2 for a, b in zip(alone, read[length - 1 :], strict=True)) ** 0.5
    return error / spread

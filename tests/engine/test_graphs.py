"""Graphs hold calls of steps alone, filled up to a rung, and compute what the call itself would."""

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from qwen3_next.engine import LLM, Completion, EngineConfig, SamplingParams
from qwen3_next.engine.batch import Batch
from qwen3_next.engine.graphs import Call, Graphs, is_graphable, rung_of
from qwen3_next.engine.plan import Plan

TEXTS = ("Once upon a time, there was a little", "def add(a, b):\n", "The sun", "One day, Tom and his dog went to", "A")


def test_a_rung_holds_the_batch_and_wastes_little() -> None:
    for most in (1, 7, 64, 256):
        rungs = [rung_of(count, most) for count in range(1, most + 1)]
        assert all(count <= rung <= most for count, rung in enumerate(rungs, 1))
        waste = [1 - count / rung for count, rung in enumerate(rungs, 1)]
        assert sum(waste) / most < 0.1
        assert max(waste) < 0.25
        assert all(rung_of(rung, most) == rung for rung in rungs)
    assert len({rung_of(count, 256) for count in range(1, 257)}) <= 32


@pytest.mark.parametrize("drafts", [0, 2])
def test_only_calls_of_steps_can_be_graphs(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Plan, Batch]] = []
    build = Batch.build

    def built(plan: Plan, *args: Any, **options: Any) -> Batch:
        batch = build(plan, *args, **options)
        seen.append((plan, batch))
        return batch

    monkeypatch.setattr(Batch, "build", built)
    llm = LLM(config=EngineConfig(max_sequences=4, token_budget=8, memory_bytes=2**27, drafts=drafts), dtype="float32")
    llm.engine.runner.is_uniform = True
    llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=12))
    graphable = [batch.inputs.segments for _, batch in seen if is_graphable(batch)]
    assert any(segments.count == 4 and segments.max_length == 1 + drafts for segments in graphable)
    for plan, batch in seen:
        assert is_graphable(batch) == all(sequence.awaits_verdict for sequence in plan)


def test_steps_that_are_filled_up_write_the_same() -> None:
    """Fewer drafts than others at the end of a text, more tokens than others in the layer that drafts."""
    config = EngineConfig(max_sequences=4, token_budget=24, memory_bytes=2**27, max_context=160, drafts=3)
    llm = LLM(config=config, dtype="float32")
    params = [
        SamplingParams(temperature=0.8 * (n % 2), seed=n, max_tokens=20 + 3 * n, ignore_eos=True) for n in range(5)
    ]
    params[1] = dataclasses.replace(params[1], max_tokens=None)  # to the end of the context
    plain = [one.token_ids for group in llm.generate(TEXTS, params) for one in group]
    drafter, computed = llm.engine.drafter, list[Call]()
    assert drafter is not None

    def run(call: Call) -> Any:
        computed.append(call)
        return drafter._compute(call)

    drafter.graphs = cast("Graphs", SimpleNamespace(run=run))
    llm.engine.runner.is_uniform = True
    llm.engine.scheduler.memory.evict_all()
    assert [one.token_ids for group in llm.generate(TEXTS, params) for one in group] == plain
    assert all(call.inputs.segments.is_uniform for call in computed)
    assert any(call.inputs.segments.max_length > 1 and call.inputs.segments.count > 1 for call in computed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("drafts", [0, 3])
def test_graphs_write_what_calls_without_them_write(drafts: int) -> None:
    config = EngineConfig(max_sequences=5, memory_bytes=2**28, drafts=drafts)
    llm = LLM(config=config, dtype="float32", device="cuda")
    params = [SamplingParams(temperature=0.8 * (n % 2), seed=n, max_tokens=40 + n) for n in range(len(TEXTS))]

    def write() -> list[tuple[int, ...]]:
        groups: Sequence[tuple[Completion, ...]] = llm.generate(TEXTS, params)
        return [one.token_ids for group in groups for one in group]

    replayed = write()
    assert llm.engine.runner.graphs is not None
    llm.engine.runner.graphs = None
    assert write() == replayed

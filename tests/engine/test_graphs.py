"""Graphs hold calls of steps alone, filled up to a rung, and compute what the call itself would."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from qwen3_next.engine import LLM, Completion, EngineConfig, SamplingParams
from qwen3_next.engine.batch import Batch
from qwen3_next.engine.graphs import Shape, rung_of, shape_of
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
def test_only_calls_of_steps_have_a_shape(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Plan, Shape | None]] = []
    build = Batch.build

    def built(plan: Plan, *args: Any) -> Batch:
        batch = build(plan, *args)
        seen.append((plan, shape_of(batch, 4)))
        return batch

    monkeypatch.setattr(Batch, "build", built)
    llm = LLM(config=EngineConfig(max_sequences=4, token_budget=8, memory_bytes=2**27, drafts=drafts), dtype="float32")
    llm.generate(TEXTS, SamplingParams(temperature=0, max_tokens=12))
    found = [shape for _, shape in seen if shape is not None]
    assert Shape(4, 1 + drafts, has_accepted=drafts > 0) in found
    for plan, shape in seen:
        lengths = {sequence.length for sequence in plan}
        if shape is not None:
            assert all(sequence.awaits_verdict for sequence in plan)
            assert lengths == {shape.length}
        elif drafts == 0:
            assert not all(sequence.awaits_verdict for sequence in plan)


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

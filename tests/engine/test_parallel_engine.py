"""Several ranks with one engine write what a single one writes."""

import os
import signal
import time
from typing import Any

import pytest
from tests.model.parallel_ranks import run_ranks

from qwen3_next.engine import LLM, EngineConfig, SamplingParams
from qwen3_next.engine.parallel import ParallelEngine
from qwen3_next.errors import RankError

PROMPTS = ["Once upon a time, in a small village", "def add(", "Once upon a time, in a small village by the sea"]
PARAMS = SamplingParams(temperature=0, max_tokens=12)


def written(llm: LLM) -> list[Any]:
    """Together, and once more from the prefix cache."""
    return [[group[0].token_ids for group in llm.generate(PROMPTS, PARAMS, progress=False)] for _ in range(2)]


def config(drafts: int) -> EngineConfig:
    return EngineConfig(max_sequences=4, token_budget=64, memory_bytes=2**26, drafts=drafts)


def on_a_rank() -> list[Any]:
    found: list[Any] = []
    for tp, ep, drafts in ((2, 1, 0), (1, 2, 2)):
        llm = LLM(dtype="float32", device="cpu", config=config(drafts), tp=tp, ep=ep)
        assert isinstance(llm.engine, ParallelEngine)
        if llm.engine.ranks.leads:
            found.append(written(llm))
            llm.engine.close()
        else:
            llm.engine.follow()
    return found


def left_alone() -> float:
    llm = LLM(dtype="float32", device="cpu", config=config(0), tp=1, ep=2)
    assert isinstance(llm.engine, ParallelEngine)
    if not llm.engine.ranks.leads:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RankError):
        llm.generate(PROMPTS, PARAMS, progress=False)
    return time.monotonic() - start


def test_a_rank_that_is_left_alone_says_so_instead_of_waiting() -> None:
    seconds, killed = run_ranks(2, left_alone, may_die=True)
    assert killed is None
    assert seconds < 30


def test_two_ranks_write_what_one_writes() -> None:
    first, _ = run_ranks(2, on_a_rank)
    assert first == [written(LLM(dtype="float32", device="cpu", config=config(drafts))) for drafts in (0, 2)]

"""Streams of a program that needs no event loop, and calls of the engine that were left half-way."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import scramble, tiny_config

import qwen3_next
from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.engine import LLM, EngineConfig, FinishReason, SamplingParams, StreamUpdate
from qwen3_next.errors import InputError

ASSETS = Path(qwen3_next.__file__).parent / "assets"
PROMPT = "Once upon a time"
GREEDY = SamplingParams(temperature=0, max_tokens=9)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llm")
    torch.manual_seed(5)
    config = tiny_config(vocab_size=4096, max_position_embeddings=400, eos_token_id=None, dtype="float32")
    model = Qwen3NextForCausalLM(config)
    scramble(model)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, directory)
    return directory


@pytest.fixture
def llm(checkpoint: Path) -> Iterator[LLM]:
    """When a test is over, nothing is left of what it asked for."""
    config = EngineConfig(max_sequences=4, token_budget=48, memory_bytes=2**24)
    llm = LLM(str(checkpoint), dtype="float32", config=config)
    yield llm
    assert not llm.engine.has_work
    figures = llm.engine.scheduler.memory.figures
    assert (figures.used_pages, figures.used_slots) == (0, 0)
    llm.engine.scheduler.check()


def ids(updates: list[StreamUpdate]) -> tuple[int, ...]:
    return tuple(token for update in updates for token in update.token_ids)


def test_a_stream_is_generate_in_pieces(llm: LLM) -> None:
    whole = llm.generate(PROMPT, GREEDY)[0][0]
    updates = list(llm.stream(PROMPT, GREEDY))
    assert ids(updates) == whole.token_ids
    assert "".join(update.text for update in updates) == whole.text
    assert [update.output_tokens for update in updates] == list(range(1, 10))
    assert updates[-1].finish is FinishReason.LENGTH


def test_leaving_a_stream_ends_its_request(llm: LLM) -> None:
    for update in llm.stream(PROMPT, SamplingParams(n=3, max_tokens=300)):
        assert update.finish is None
        break


def test_calls_may_take_turns(llm: LLM) -> None:
    whole = llm.generate([PROMPT, "def f(x):"], GREEDY)
    first, second = llm.stream(PROMPT, GREEDY), llm.stream("def f(x):", GREEDY)
    begun = [next(first)], [next(second)]
    assert llm.generate(PROMPT, GREEDY)[0][0].token_ids == whole[0][0].token_ids
    assert ids([*begun[1], *second]) == whole[1][0].token_ids
    assert ids([*begun[0], *first]) == whole[0][0].token_ids


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_in_the_middle_of_a_step_ends_what_was_open(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    whole = llm.generate(PROMPT, GREEDY)[0][0]
    other = llm.stream("def f(x):", GREEDY)
    next(other)
    works = llm.engine.runner.run

    def interrupted(*arguments: Any) -> Any:
        works(*arguments)
        raise error

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(error):
        llm.generate([PROMPT] * 3, GREEDY)
    monkeypatch.setattr(llm.engine.runner, "run", works)
    assert list(other)[-1].finish is FinishReason.ABORT
    assert ids(list(llm.stream(PROMPT, GREEDY))) == whole.token_ids


def test_what_cannot_be_served_is_refused(llm: LLM) -> None:
    with pytest.raises(InputError, match="9999"):
        next(llm.stream([1, 9999], SamplingParams(n=2)))

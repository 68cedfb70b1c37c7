"""What an update says of its steps: which tokens were drafts, and which text came with which token."""

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.engine.test_speculative import checkpoint as checkpoint
from tests.engine.test_speculative import engine_of, greedy, guessing, prompts

from qwen3_next.engine import LLM, SamplingParams, StreamUpdate


def updates_of(llm: LLM, params: SamplingParams) -> list[StreamUpdate]:
    return list(llm.stream(prompts()[2], params))


def pieces(updates: list[StreamUpdate]) -> list[str]:
    """The text of each token; what was held back until the end comes behind them."""
    text = "".join(update.text for update in updates)
    ends = [0, *accumulate(length for update in updates for step in update.steps for length in step.lengths)]
    return [text[start:end] for start, end in [*pairwise(ends), (ends[-1], len(text))]]


@pytest.mark.parametrize("errors", [0, 0.3, 1])
def test_steps_tell_accepted_drafts_from_rejected_ones(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, errors: float
) -> None:
    params = greedy(60)
    expected = updates_of(engine_of(checkpoint), params)
    guessing(monkeypatch, {tuple(prompts()[2]): tuple(token for one in expected for token in one.token_ids)}, errors)
    llm = engine_of(checkpoint, 3)
    updates = updates_of(llm, params)
    steps = [step for update in updates for step in update.steps]
    assert [len(update.token_ids) for update in updates] == [len(step.lengths) for step in steps]
    assert all(step.accepted == len(step.lengths) - 1 for step in steps), "drafts, and one token of the network"
    tallies = llm.engine.drafts.figures.by_position
    assert sum(step.accepted for step in steps) == sum(tally.accepted for tally in tallies)
    assert sum(step.accepted + step.rejected for step in steps) == sum(tally.proposed for tally in tallies) > 0
    assert (sum(step.rejected for step in steps) == 0) == (errors == 0)
    assert (sum(step.accepted for step in steps) == 0) == (errors == 1)


def test_without_drafts_none_is_accepted_or_rejected(checkpoint: Path) -> None:
    steps = [step for update in updates_of(engine_of(checkpoint), greedy(9)) for step in update.steps]
    assert [(len(step.lengths), step.accepted, step.rejected) for step in steps] == [(1, 0, 0)] * 9


@pytest.mark.parametrize("changes", [{}, {"stop": ("\x00never", "eeee")}, {"temperature": 1.5, "seed": 4}])
def test_each_token_has_the_text_that_it_has_alone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """A random model writes halves of characters, which are held back until the token that completes them."""
    params = SamplingParams(**({"temperature": 0, "max_tokens": 60} | changes))
    alone = updates_of(engine_of(checkpoint), params)
    guessing(monkeypatch, {tuple(prompts()[2]): tuple(token for one in alone for token in one.token_ids)}, 0.3)
    drafted = updates_of(engine_of(checkpoint, 3), params)
    assert len(drafted) < len(alone)
    assert pieces(drafted) == pieces(alone)
    assert "" in pieces(alone)


def test_a_text_that_ends_among_drafts_has_a_length_for_each_token(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = engine_of(checkpoint).generate(prompts()[2], greedy(20))[0]
    guessing(monkeypatch, {tuple(prompts()[2]): whole.token_ids}, 0)
    llm = engine_of(checkpoint, 3)
    cut = 0
    for place in range(1, 9):
        updates = updates_of(llm, greedy(20, stop_token_ids=(whole.token_ids[place],)))
        for update in updates:
            assert sum(len(step.lengths) for step in update.steps) == len(update.token_ids)
        last = updates[-1].steps[-1]
        cut += last.accepted == len(last.lengths)
    assert cut, "some end with a draft, behind which nothing of the network's own was written"

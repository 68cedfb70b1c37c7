"""The log-probabilities of a prompt are those of one plain forward, however the engine reads the prompt."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from tests.engine.test_engine import KNOWN, engine_of, greedy, prompts
from tests.engine.test_engine import checkpoint as checkpoint
from tests.engine.test_engine import memory_is_checked as memory_is_checked

from qwen3_next import Qwen3NextForCausalLM
from qwen3_next.engine import Completion, Request, prompt_logprobs
from qwen3_next.engine.sampler import Drawn

TOP = 3


def told(completion: Completion) -> tuple[Drawn, ...]:
    assert completion.prompt_logprobs is not None
    return completion.prompt_logprobs


def same(found: tuple[Drawn, ...], expected: tuple[Drawn, ...]) -> None:
    """Equal but for the rounding of products of other shapes."""
    assert [one.token for one in found] == [one.token for one in expected]
    assert (found[0].logprob, found[0].top_logprobs) == (None, ())
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        values, others = [[value for _, value in drawn.top_logprobs] for drawn in (one, other)]
        assert values == pytest.approx(others, abs=1e-4)
        apart = min((a - b for a, b in itertools.pairwise(others)), default=1)
        assert apart < 1e-3 or [t for t, _ in one.top_logprobs] == [t for t, _ in other.top_logprobs]


@pytest.fixture(scope="module")
def by_transformers(checkpoint: Path) -> list[tuple[Drawn, ...]]:
    """A plain forward of each prompt, and plain Python."""
    model = Qwen3NextForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected: list[tuple[Drawn, ...]] = []
    for prompt in prompts():
        with torch.no_grad():
            rows = model(torch.tensor([prompt])).logits[0, :, :KNOWN].log_softmax(-1)
        drawn = [Drawn(prompt[0])]
        for token, row in zip(prompt[1:], rows, strict=False):
            top = sorted(enumerate(row.tolist()), key=lambda pair: -pair[1])[:TOP]
            drawn.append(Drawn(token, float(row[token]), tuple(top)))
        expected.append(tuple(drawn))
    return expected


@pytest.mark.parametrize(("budget", "piece"), [(400, 256), (400, 7), (9, 256), (48, 5)])
def test_they_are_those_of_a_plain_forward_however_the_prompt_is_cut(
    checkpoint: Path,
    by_transformers: list[tuple[Drawn, ...]],
    monkeypatch: pytest.MonkeyPatch,
    budget: int,
    piece: int,
) -> None:
    monkeypatch.setattr(prompt_logprobs, "PIECE", piece)
    llm = engine_of(checkpoint, token_budget=budget)
    for (completion,), expected in zip(
        llm.generate(prompts(), greedy(2, prompt_logprobs=TOP)), by_transformers, strict=True
    ):
        same(told(completion), expected)
        assert len(completion.token_ids) == 2


def test_a_cached_prompt_is_computed_again_for_who_asks(
    checkpoint: Path, by_transformers: list[tuple[Drawn, ...]]
) -> None:
    llm = engine_of(checkpoint)
    prompt = prompts()[5]
    llm.generate(prompt, greedy(2))
    (unasked,), (asked,) = llm.generate([prompt, prompt], [greedy(2), greedy(2, prompt_logprobs=TOP)])
    assert unasked.cached_tokens > 0
    assert unasked.prompt_logprobs is None
    assert asked.cached_tokens == 0
    assert asked.token_ids == unasked.token_ids
    same(told(asked), by_transformers[5])


def test_none_of_the_likeliest_and_ids_that_only_fill_up_the_head(checkpoint: Path) -> None:
    completion = engine_of(checkpoint).generate([5, KNOWN + 3, 7], greedy(1, prompt_logprobs=0))[0][0]
    first, filling, last = told(completion)
    assert (first, filling) == (Drawn(5), Drawn(KNOWN + 3, -math.inf))
    assert last.logprob is not None
    assert math.isfinite(last.logprob)
    assert last.top_logprobs == ()


def test_a_request_that_is_preempted_is_told_once(checkpoint: Path) -> None:
    """Behind its prompt, and in the middle of it."""
    small = {"max_context": 192, "memory_bytes": 176_000, "drafts": 0}
    long, params = prompts((60, 61, 62)), greedy(100, prompt_logprobs=TOP)
    whole = engine_of(checkpoint).generate(long, params)
    llm = engine_of(checkpoint, **small)
    for (completion,), (expected,) in zip(llm.generate(long, params), whole, strict=True):
        same(told(completion), told(expected))
    assert llm.engine.scheduler.figures.preemptions > 0

    first, second = prompts((130, 150))
    engine = engine_of(checkpoint, token_budget=64, **small).engine
    request = Request(request_id="low", prompt=tuple(first), params=greedy(2, prompt_logprobs=TOP))
    engine.add(request)
    outputs = engine.step()
    assert request.computed == 64
    engine.add(Request(request_id="high", prompt=tuple(second), params=greedy(2), priority=5))
    while engine.has_work:
        outputs += engine.step()
    assert request.preemptions > 0
    (once,) = [output.prompt_logprobs for output in outputs if output.prompt_logprobs]
    same(once, told(engine_of(checkpoint).generate(first, request.params)[0][0]))

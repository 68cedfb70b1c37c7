"""Choosing tokens: filters against a plain definition, random numbers, distributions."""

import math
import random
from typing import Any

import pytest
import torch

from qwen3_next.engine import Request, SamplingParams
from qwen3_next.engine.sampler import Draw, draw, uniform

VOCABULARY = 12
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    {"repetition_penalty": 1.7, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    {"logit_bias": {3: 2.5, 1: -100.0}},
]


def request(tokens: list[int], prompt: int = 2, **params: Any) -> Request:
    made = Request(request_id="r", prompt=tuple(tokens[:prompt]), params=SamplingParams(**params))
    made.tokens += tokens[prompt:]
    return made


def expected_distribution(logits: list[float], made: Request) -> list[float]:
    """The definition, one token after the other in plain Python."""
    p, adjusted = made.params, list(logits)
    for token in set(made.tokens):
        adjusted[token] *= 1 / p.repetition_penalty if adjusted[token] > 0 else p.repetition_penalty
    for token in set(made.output):
        adjusted[token] -= p.presence_penalty + p.frequency_penalty * list(made.output).count(token)
    for token, bias in p.logit_bias.items():
        adjusted[token] += bias
    weights = [math.exp((x - max(adjusted)) / p.temperature) for x in adjusted]
    shares = [w / sum(weights) for w in weights]
    kept, before = dict[int, float](), 0.0
    for place, token in enumerate(sorted(range(len(shares)), key=lambda t: (-shares[t], t))):
        fits = (not p.top_k or place < p.top_k) and before < p.top_p and shares[token] >= p.min_p * max(shares)
        if place == 0 or fits:
            kept[token] = shares[token]
        before += shares[token]
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(shares))]


@pytest.mark.parametrize("params", FILTERS)
def test_tokens_are_drawn_from_the_distribution_that_the_parameters_define(params: dict[str, Any]) -> None:
    """A chi-square test over 20,000 draws, with 99.99 % of chances to pass where all is right."""
    made, count = request([1, 2, 3, 3, 5], **params), 20_000
    torch.manual_seed(3)
    logits = 2 * torch.randn(VOCABULARY)
    expected = expected_distribution(logits.tolist(), made)
    seen = [0] * VOCABULARY
    draws = [Draw(made, seed) for seed in range(count)]
    for drawn in draw(logits.expand(count, -1), draws, VOCABULARY, frozenset()).drawn():
        assert drawn.token is not None
        seen[drawn.token] += 1
    likely = [(n, share * count) for n, share in zip(seen, expected, strict=True) if share * count >= 5]
    rare = sum(n for n, share in zip(seen, expected, strict=True) if 0 < share * count < 5)
    assert all(share > 0 or n == 0 for n, share in zip(seen, expected, strict=True))
    statistic = sum((n - wanted) ** 2 / wanted for n, wanted in likely)
    freedom = max(1, len(likely) - 1)
    # Wilson and Hilferty's approximation of the 99.99 % quantile.
    assert statistic <= freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert rare < 60


def test_a_row_depends_on_nothing_but_itself() -> None:
    torch.manual_seed(1)
    logits = torch.randn(len(FILTERS), VOCABULARY)
    draws = [Draw(request([1, 2, 3, 3, 5], **params), seed) for seed, params in enumerate(FILTERS)]
    together = draw(logits, draws, VOCABULARY, frozenset()).drawn()
    for row, one in enumerate(draws):
        assert draw(logits[row : row + 1], [one], VOCABULARY, frozenset()).drawn() == [together[row]]
    assert draw(logits[:0], [], VOCABULARY, frozenset()).drawn() == []


def test_greedy_takes_the_likeliest_of_what_is_known() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0], [5.0, 3.0, 2.0, 9.0]])
    draws = [Draw(request([1, 2], temperature=0), 0), Draw(request([1, 2], temperature=0, min_tokens=1), 0)]
    assert [drawn.token for drawn in draw(logits, draws, 3, frozenset({0})).drawn()] == [1, 1]  # 0 may not end it yet


@pytest.mark.parametrize("params", [*FILTERS, {"temperature": 0}, {"temperature": 50.0}])
def test_only_what_is_allowed_comes_whatever_the_parameters(params: dict[str, Any]) -> None:
    torch.manual_seed(2)
    logits, allowed = 5 * torch.randn(VOCABULARY), torch.arange(VOCABULARY) % 3 == 2
    values: dict[str, Any] = {"logit_bias": {1: 1e4, 3: 1e4}}
    made = request([1, 2, 3, 3, 5], **(values | params))
    draws = [Draw(made, seed, allowed if seed % 2 else None) for seed in range(400)]
    found = draw(logits.expand(400, -1), draws, VOCABULARY, frozenset()).drawn()
    assert {one.token for one in found[1::2]} <= set(range(2, VOCABULARY, 3))
    assert found[::2] == [draw(logits[None], [one], VOCABULARY, frozenset()).drawn()[0] for one in draws[::2]]


@pytest.mark.parametrize("temperature", [0, 1])
def test_where_ends_and_a_grammar_leave_nothing_the_grammar_decides(temperature: float) -> None:
    logits, allowed = torch.tensor([[1.0, 5.0, 2.0, 9.0]]), torch.tensor([True, False, True, False])
    ends = frozenset({0, 2, 3})

    def drawn(allowed: torch.Tensor | None, **params: Any) -> set[int | None]:
        made = request([1, 1], temperature=temperature, min_tokens=4, **params)
        return {draw(logits, [Draw(made, seed, allowed)], 4, ends).drawn()[0].token for seed in range(40)}

    assert drawn(None) == {1}
    assert 3 in drawn(None, stop_token_ids=(1,))  # nothing is left: the likeliest as ever
    assert drawn(allowed) <= {0, 2}
    assert drawn(torch.tensor([True, True, False, False])) == {1}
    # Who ignores ends does so as long as something else is allowed.
    assert drawn(torch.tensor([True, True, False, False]), ignore_eos=True) == {1}
    assert drawn(allowed, ignore_eos=True) <= {0, 2}


def test_a_row_that_is_not_finite_is_told_and_the_others_are_drawn() -> None:
    logits = torch.tensor([[1.0, math.nan, 2.0], [1.0, 5.0, 2.0], [math.inf, 0.0, 0.0]])
    draws = [Draw(request([1, 2], temperature=t), 7) for t in (0, 0, 1)]
    assert [drawn.token for drawn in draw(logits, draws, 3, frozenset()).drawn()] == [None, 1, None]


def test_random_numbers_are_uniform_and_independent_of_seed_and_position() -> None:
    chance = random.Random(4)
    seeds = [0, 1, 2, 2**63, 2**64 - 1, *(chance.getrandbits(64) for _ in range(45))]
    numbers = [[uniform(seed, position) for position in range(400)] for seed in seeds]
    flat = [number for row in numbers for number in row]
    assert all(0 <= number < 1 for number in flat)
    assert len(set(flat)) == len(flat)
    counts = [sum(number * 20 // 1 == part for number in flat) for part in range(20)]
    assert sum((n - 1000) ** 2 / 1000 for n in counts) < 52  # 99.99 % of 19 degrees of freedom
    for shifted in ([row[1:] + row[:1] for row in numbers], numbers[1:] + numbers[:1]):
        pairs = zip(flat, [number for row in shifted for number in row], strict=True)
        correlation = 12 * sum((a - 0.5) * (b - 0.5) for a, b in pairs) / len(flat)
        assert abs(correlation) < 4 / len(flat) ** 0.5


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30, 1e-6])
def test_the_least_temperatures_act_like_none(temperature: float) -> None:
    logits = 100 * torch.randn(8, VOCABULARY)
    logits[1, 3] = 1e30
    draws = [Draw(request([1, 2], temperature=temperature), seed) for seed in range(8)]
    tokens = [one.token for one in draw(logits, draws, VOCABULARY, frozenset()).drawn()]
    assert tokens == logits.argmax(dim=1).tolist()

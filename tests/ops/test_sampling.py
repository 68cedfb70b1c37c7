"""Sampling is what transformers' processors define, step by step, and draws what the distribution says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process

from qwen3_next.errors import InputError
from qwen3_next.ops.sampling import Sampling, distribution, penalize_repetition, sample

VOCABULARY = 50


def random_logits() -> Tensor:
    return torch.randn(VOCABULARY) * 3


def processed(logits: Tensor, *processors: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The probabilities after transformers' processors."""
    rows = logits[None]
    for processor in processors:
        rows = processor(torch.zeros(1, 1, dtype=torch.long), rows)
    return rows[0].softmax(dim=-1)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_temperature_is_transformers(temperature: float) -> None:
    logits = random_logits()
    expected = processed(logits, logits_process.TemperatureLogitsWarper(temperature))
    torch.testing.assert_close(distribution(logits, Sampling(temperature=temperature)), expected)


@pytest.mark.parametrize("k", [1, 2, 7, VOCABULARY, 10 * VOCABULARY])
def test_top_k_is_transformers(k: int) -> None:
    logits = random_logits()
    result = distribution(logits, Sampling(top_k=k))
    torch.testing.assert_close(result, processed(logits, logits_process.TopKLogitsWarper(k)))
    assert (result > 0).sum() == min(k, VOCABULARY)


@pytest.mark.parametrize("low", [0.0, 0.25, 0.5, 0.75])
def test_top_p_is_transformers_and_the_smallest_set_that_reaches_p(low: float) -> None:
    logits, p = random_logits(), low + 0.25 * torch.rand(()).clamp(0.01, 0.99).item()
    result = distribution(logits, Sampling(top_p=p))
    torch.testing.assert_close(result, processed(logits, logits_process.TopPLogitsWarper(p)))
    probabilities, kept = logits.softmax(dim=-1), result > 0
    assert probabilities[kept].sum() >= p - 1e-6
    assert probabilities[kept].sum() - probabilities[kept].min() < p + 1e-6


@pytest.mark.parametrize("min_p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_is_transformers(min_p: float) -> None:
    logits = random_logits()
    expected = processed(logits, logits_process.MinPLogitsWarper(min_p))
    torch.testing.assert_close(distribution(logits, Sampling(min_p=min_p)), expected)


def test_the_steps_come_in_transformers_order() -> None:
    logits = random_logits()
    sampling = Sampling(temperature=1.7, top_k=12, top_p=0.8, min_p=0.05)
    expected = processed(
        logits,
        logits_process.TemperatureLogitsWarper(1.7),
        logits_process.TopKLogitsWarper(12),
        logits_process.TopPLogitsWarper(0.8),
        logits_process.MinPLogitsWarper(0.05),
    )
    torch.testing.assert_close(distribution(logits, sampling), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_transformers_however_often_a_token_was_seen(penalty: float) -> None:
    logits, seen = random_logits(), torch.randint(VOCABULARY, (40,))
    expected = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(seen[None], logits[None].clone())[0]
    torch.testing.assert_close(penalize_repetition(logits, seen, penalty), expected)


def test_logits_are_left_untouched() -> None:
    logits = random_logits()
    before = logits.clone()
    sample(logits, [1, 2, 3], Sampling(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.5))
    assert torch.equal(logits, before)


def test_temperature_zero_takes_the_likeliest_token_after_the_penalty() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert sample(logits, [], Sampling(temperature=0)) == 1
    assert sample(logits, [1], Sampling(temperature=0, repetition_penalty=2.0)) == 2


def test_tokens_are_drawn_as_often_as_the_distribution_says() -> None:
    logits, sampling, draws = torch.randn(6), Sampling(temperature=0.8, top_k=4), 3000
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    counts = torch.bincount(
        torch.tensor([sample(logits, [], sampling, generator) for _ in range(draws)]), minlength=logits.numel()
    )
    expected = distribution(logits, sampling)
    six_sigmas = 6 * (draws * expected * (1 - expected)).sqrt()
    assert ((counts - draws * expected).abs() <= six_sigmas + 1e-9).all()


def test_a_generator_of_the_same_seed_draws_the_same_tokens() -> None:
    logits = random_logits()
    first, second = (
        [sample(logits, [], Sampling(), generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(5), torch.Generator().manual_seed(5))
    )
    assert first == second


@pytest.mark.parametrize("temperature", [1e-30, 1e-45, 1e-300])
def test_the_lowest_temperatures_take_the_likeliest_token(temperature: float) -> None:
    logits = random_logits()
    sampling = Sampling(temperature=temperature)
    assert torch.equal(distribution(logits, sampling), torch.eye(logits.shape[-1])[logits.argmax(dim=-1)])


def test_what_must_not_come_never_comes() -> None:
    logits = torch.full((VOCABULARY,), -torch.inf)
    logits[[3, 9]] = torch.randn(2)
    assert {sample(logits, [], Sampling(temperature=5.0, repetition_penalty=1.2)) for _ in range(50)} <= {3, 9}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.01},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
    ids=str,
)
def test_a_value_outside_its_range_is_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)

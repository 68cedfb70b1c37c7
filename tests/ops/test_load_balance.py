"""The balance loss at its extremes, against its sum, and whatever the tokens are cut into."""

import pytest
import torch
from torch import Tensor

from qwen3_next.ops.load_balance import load_balancing_loss, load_balancing_loss_of
from qwen3_next.ops.routing import Routing, expert_counts, route

EXPERTS, TOP_K = 8, 2


def routing_of(logits: Tensor) -> Routing:
    return route(logits, torch.eye(EXPERTS), TOP_K, True)


def collapsed(tokens: int) -> Tensor:
    """Every token is certain of the same K experts."""
    return torch.tensor([50.0] * TOP_K + [0.0] * (EXPERTS - TOP_K)).expand(tokens, -1)


def balanced(tokens: int) -> Tensor:
    """Each token prefers K neighbours in turn, so that all experts are chosen equally often."""
    turns = (torch.arange(tokens)[:, None] * TOP_K + torch.arange(TOP_K)) % EXPERTS
    return torch.zeros(tokens, EXPERTS).scatter_(1, turns, 1.0)


def test_an_even_load_costs_k() -> None:
    torch.testing.assert_close(load_balancing_loss_of([routing_of(balanced(24))]), torch.tensor(float(TOP_K)))


def test_a_collapsed_load_costs_e() -> None:
    torch.testing.assert_close(load_balancing_loss_of([routing_of(collapsed(24))]), torch.tensor(float(EXPERTS)))


def test_layers_are_averaged() -> None:
    losses = load_balancing_loss_of([routing_of(balanced(24)), routing_of(collapsed(24))])
    torch.testing.assert_close(losses, torch.tensor((TOP_K + EXPERTS) / 2))


def test_the_loss_is_its_sum_over_experts() -> None:
    routing = routing_of(torch.randn(30, EXPERTS))
    total = 0.0
    for e in range(EXPERTS):
        frequency = (routing.experts == e).any(1).double().mean().item()
        total += EXPERTS * frequency * routing.probabilities[:, e].double().mean().item()
    loss = load_balancing_loss_of([routing])
    assert loss is not None
    assert loss.item() == pytest.approx(total, rel=1e-6)


def test_parts_of_a_batch_add_up_to_the_batch() -> None:
    logits = torch.randn(30, EXPERTS)
    whole, parts = routing_of(logits), [routing_of(part) for part in logits.split([7, 1, 22])]
    counts = sum(expert_counts(part.experts, EXPERTS) for part in parts)
    losses = [load_balancing_loss(counts, 30, part.probabilities.sum(0), 30) for part in parts]
    torch.testing.assert_close(torch.stack(losses).sum(), load_balancing_loss_of([whole]))


def test_the_gradient_pushes_load_away_from_the_crowded_experts() -> None:
    logits = (torch.randn(200, EXPERTS) * 0.1 + collapsed(1) * 0.02).requires_grad_()
    (grad,) = torch.autograd.grad(load_balancing_loss_of([routing_of(logits)]), logits)
    assert (grad.sum(0)[:TOP_K] > 0).all()
    assert (grad.sum(0)[TOP_K:] < 0).all()


def test_no_sparse_layer_has_no_loss_and_no_token_costs_nothing() -> None:
    assert load_balancing_loss_of([]) is None
    assert load_balancing_loss_of([routing_of(torch.zeros(0, EXPERTS))]) == 0

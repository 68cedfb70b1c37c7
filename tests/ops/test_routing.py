"""Routing against its definition, written out in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3_next.ops.backend import use
from qwen3_next.ops.routing import expert_counts, route

EXPERTS, HIDDEN = 6, 16


def random_choice(tokens: int) -> torch.Tensor:
    return torch.rand(tokens, EXPERTS).topk(3).indices


@pytest.mark.parametrize("normalize", [True, False])
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9), st.integers(1, EXPERTS))
def test_routing_is_a_softmax_over_all_and_the_best_of_it(normalize: bool, tokens: int, top_k: int) -> None:
    x, gate = torch.randn(tokens, HIDDEN), torch.randn(EXPERTS, HIDDEN)
    routing = route(x, gate, top_k, normalize)
    probabilities = (x.double() @ gate.double().T).softmax(-1)
    weights, experts = probabilities.sort(descending=True)
    weights = weights[:, :top_k] / (weights[:, :top_k].sum(-1, keepdim=True) if normalize else 1)
    assert torch.equal(routing.experts, experts[:, :top_k])
    torch.testing.assert_close(routing.weights.double(), weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.probabilities.double(), probabilities, rtol=1e-5, atol=1e-6)


def test_bf16_routing_keeps_probabilities_in_fp32_and_rounds_the_weights() -> None:
    x, gate = torch.randn(50, HIDDEN).bfloat16(), torch.randn(EXPERTS, HIDDEN).bfloat16()
    with use("reference"):  # a twin keeps the logits in fp32 until it stores them
        routing = route(x, gate, 3, True)
    assert routing.logits.dtype == routing.weights.dtype == torch.bfloat16
    assert torch.equal(routing.probabilities, routing.logits.float().softmax(-1))
    chosen = routing.probabilities.gather(1, routing.experts)
    assert torch.equal(routing.weights, (chosen / chosen.sum(-1, keepdim=True)).bfloat16())


@pytest.mark.parametrize("grad", [True, False])
def test_a_choice_made_before_is_repeated_with_weights_of_now(grad: bool) -> None:
    x, gate, given_choice = torch.randn(7, HIDDEN), torch.randn(EXPERTS, HIDDEN), random_choice(7)
    with torch.set_grad_enabled(grad):
        routing = route(x, gate, 3, True, given_choice)
        own = route(x, gate, 3, True)
        again = route(x, gate, 3, True, own.experts)
    assert torch.equal(routing.experts, given_choice)
    chosen = (x @ gate.T).softmax(-1).gather(1, given_choice)
    torch.testing.assert_close(routing.weights, chosen / chosen.sum(-1, keepdim=True))
    assert torch.equal(own.weights, again.weights)


def test_gradients_of_the_weights_reach_every_router_row() -> None:
    gate = torch.randn(EXPERTS, HIDDEN).requires_grad_()
    weights = route(torch.randn(5, HIDDEN), gate, 2, False).weights
    (grad,) = torch.autograd.grad((weights * torch.randn_like(weights)).sum(), gate)
    assert (grad.abs().amax(1) > 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30))
def test_counts_are_how_often_each_expert_was_chosen(tokens: int) -> None:
    experts = random_choice(tokens)
    expected = [(experts == e).sum().item() for e in range(EXPERTS)]
    assert expert_counts(experts, EXPERTS).tolist() == expected

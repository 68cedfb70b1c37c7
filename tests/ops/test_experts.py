"""Routing against its definition, grouped experts against a loop over tokens and their experts."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.checks import assert_pure, assert_same_gradients, relative_error
from torch import Tensor

from qwen3_next.ops import experts as experts_module
from qwen3_next.ops.experts import expert_counts, route, swiglu_experts

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
EXPERTS, HIDDEN, WIDTH = 6, 16, 24

Choice = Callable[[int], Tensor]
CHOICES: dict[str, Choice] = {
    "spread": lambda tokens: torch.rand(tokens, EXPERTS).topk(3).indices,
    "all to one": lambda tokens: torch.full((tokens, 1), 4),
    "the same three": lambda tokens: torch.tensor([5, 0, 2]).expand(tokens, 3),
    "all experts": lambda tokens: torch.arange(EXPERTS).expand(tokens, EXPERTS),
}


def token_loop(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The oracle, in fp64."""
    x, gate_up, down, weights = (t.double() for t in (x, gate_up, down, weights))
    outputs = [torch.zeros(0, x.shape[1], dtype=torch.float64)]
    for t in range(len(x)):
        total = torch.zeros_like(x[t])
        for k, e in enumerate(experts[t].tolist()):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            total = total + weights[t, k] * (down[e] @ (gate * gate.sigmoid() * up))
        outputs.append(total[None])
    return torch.cat(outputs)


def random_inputs(
    tokens: int, choice: Choice = CHOICES["spread"], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    experts = choice(tokens)
    floats = (
        torch.randn(tokens, HIDDEN),
        torch.randn(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5,
        torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5,
        torch.rand(experts.shape),
    )
    x, gate_up, down, weights = (t.to(dtype) for t in floats)
    return x, gate_up, down, weights, experts


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
    routing = route(x, gate, 3, True)
    assert routing.logits.dtype == routing.weights.dtype == torch.bfloat16
    assert torch.equal(routing.probabilities, routing.logits.float().softmax(-1))
    chosen = routing.probabilities.gather(1, routing.experts)
    assert torch.equal(routing.weights, (chosen / chosen.sum(-1, keepdim=True)).bfloat16())


@pytest.mark.parametrize("grad", [True, False])
def test_a_choice_made_before_is_repeated_with_weights_of_now(grad: bool) -> None:
    x, gate, given_choice = torch.randn(7, HIDDEN), torch.randn(EXPERTS, HIDDEN), CHOICES["spread"](7)
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


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 40, 300])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_experts_equal_a_loop_over_tokens(dtype: torch.dtype, choice: str, tokens: int, grad: bool) -> None:
    inputs = random_inputs(tokens, CHOICES[choice], dtype)
    with torch.set_grad_enabled(grad):
        result = swiglu_experts(*inputs)
    assert (result.dtype, result.shape) == (dtype, inputs[0].shape)
    assert relative_error(result, token_loop(*inputs)) <= TOLERANCE[dtype]


def test_a_handful_of_tokens_on_a_gpu_reads_its_experts_directly(on_device: str) -> None:
    """The function itself runs on any device; on a GPU it must be what `swiglu_experts` takes."""
    inputs = random_inputs(3)
    gathered = experts_module._gathered(*inputs)
    assert relative_error(gathered, token_loop(*inputs)) < 1e-6
    if on_device == "cuda":
        with torch.no_grad():
            assert torch.equal(swiglu_experts(*inputs), gathered)


def test_the_grouped_kernel_equals_the_loop(on_device: str) -> None:
    inputs = random_inputs(70, dtype=torch.bfloat16)
    if not experts_module._has_grouped_gemm(*inputs[:2]):
        pytest.skip("needs a GPU of the Hopper generation or later")
    by_expert, order = inputs[4].flatten().sort(stable=True)
    grouped = experts_module._grouped(*inputs[:4], by_expert, order)
    assert relative_error(grouped, token_loop(*inputs)) < 1e-2


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("choice", CHOICES)
def test_gradients_are_those_of_the_loop(choice: str, dtype: torch.dtype) -> None:
    *floats, experts = random_inputs(9, CHOICES[choice], dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert_same_gradients(
        lambda *inputs: swiglu_experts(*inputs, experts),
        lambda *inputs: token_loop(*inputs, experts),
        floats,
        tolerance,
    )


def test_an_expert_without_a_token_has_a_gradient_of_zeros() -> None:
    *floats, experts = random_inputs(9, CHOICES["all to one"])
    floats = [x.requires_grad_() for x in floats]
    grads = torch.autograd.grad(swiglu_experts(*floats, experts).sum(), floats)
    for grad in grads[1:3]:
        assert grad[4].abs().sum() > 0
        assert grad[[0, 1, 2, 3, 5]].abs().sum() == 0


def test_no_tokens_give_no_output_and_gradients_of_zeros() -> None:
    *floats, experts = random_inputs(0)
    x = floats[0].requires_grad_()
    result = swiglu_experts(*floats, experts)
    assert result.shape == (0, HIDDEN)
    assert torch.autograd.grad(result.sum(), x)[0].shape == (0, HIDDEN)


@pytest.mark.parametrize("tokens", [1, 30])
def test_the_order_of_the_tokens_does_not_matter(tokens: int) -> None:
    x, gate_up, down, weights, experts = random_inputs(tokens)
    shuffled = torch.randperm(tokens)
    result = swiglu_experts(x, gate_up, down, weights, experts)[shuffled]
    assert (
        relative_error(swiglu_experts(x[shuffled], gate_up, down, weights[shuffled], experts[shuffled]), result) < 1e-6
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30))
def test_counts_are_how_often_each_expert_was_chosen(tokens: int) -> None:
    experts = CHOICES["spread"](tokens)
    expected = [(experts == e).sum().item() for e in range(EXPERTS)]
    assert expert_counts(experts, EXPERTS).tolist() == expected


@pytest.mark.parametrize("tokens", [1, 25])
def test_inputs_stay_and_a_second_run_is_identical(tokens: int) -> None:
    assert_pure(swiglu_experts, random_inputs(tokens))

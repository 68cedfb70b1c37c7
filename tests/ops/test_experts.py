"""Grouped experts against a loop over tokens and their experts."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from tests.ops.checks import assert_pure, assert_same_gradients, relative_error
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.backend import use
from qwen3_next.ops.experts import ExpertScales, SharedExpert, swiglu_experts
from qwen3_next.ops.linear import linear
from qwen3_next.ops.quant import quantize_block_fp8

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


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 40, 300])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_experts_equal_a_loop_over_tokens(dtype: torch.dtype, choice: str, tokens: int, grad: bool) -> None:
    # The few numbers of one token are too noisy a sample of what bf16 rounds away: several calls are.
    calls = [random_inputs(tokens, CHOICES[choice], dtype) for _ in range(max(1, 16 // tokens))]
    with torch.set_grad_enabled(grad):
        results = [swiglu_experts(*inputs) for inputs in calls]
    assert all((r.dtype, r.shape) == (dtype, i[0].shape) for r, i in zip(results, calls, strict=True))
    assert relative_error(torch.cat(results), torch.cat([token_loop(*i) for i in calls])) <= TOLERANCE[dtype]


def test_the_shared_expert_is_one_more_that_every_token_uses_with_its_own_share() -> None:
    x, gate_up, down, weights, experts = random_inputs(11)
    own_up, own_down = torch.randn(1, 2 * WIDTH, HIDDEN) / HIDDEN**0.5, torch.randn(1, HIDDEN, WIDTH) / WIDTH**0.5
    shared = SharedExpert(*own_up[0].chunk(2), own_down[0], torch.randn(1, HIDDEN))
    weights = torch.cat([weights, (x @ shared.share.T).sigmoid()], dim=1)
    experts = torch.cat([experts, torch.full((11, 1), EXPERTS)], dim=1)
    expected = token_loop(x, torch.cat([gate_up, own_up]), torch.cat([down, own_down]), weights, experts)
    result = swiglu_experts(x, gate_up, down, weights[:, :-1], experts[:, :-1], shared=shared)
    assert relative_error(result, expected) < 1e-6


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("tokens", [1, 40, 300])
def test_experts_that_are_not_here_add_nothing(tokens: int, grad: bool) -> None:
    x, gate_up, down, weights, experts = random_inputs(tokens)
    with torch.set_grad_enabled(grad):
        parts = [
            swiglu_experts(x, gate_up[first:end], down[first:end], weights, experts - first)
            for first, end in ((0, 1), (1, 4), (4, EXPERTS))
        ]
    assert relative_error(sum(parts[1:], parts[0]), token_loop(x, gate_up, down, weights, experts)) < 1e-6


@pytest.mark.parametrize("tokens", [3, 200])
def test_fp8_experts_are_linear_layers_with_their_scales(tokens: int) -> None:
    x, _, _, weights, experts = random_inputs(tokens)
    gate_up, down, scales = fp8_weights()
    with torch.no_grad():
        result = swiglu_experts(x, gate_up, down, weights, experts, scales)
    expected = torch.zeros_like(x)
    for t, k in product(range(tokens), range(experts.shape[1])):
        e = int(experts[t, k])
        sides = zip(gate_up[e].chunk(2), scales.gate_up[e].chunk(2), strict=True)
        gate, up = (linear(x[t : t + 1], weight, scale) for weight, scale in sides)
        hidden = gate * gate.sigmoid() * up
        expected[t] += weights[t, k] * linear(hidden, down[e], scales.down[e])[0]
    assert relative_error(result, expected) < 1e-2


def fp8_weights() -> tuple[Tensor, Tensor, ExpertScales]:
    _, gate_up, down, _, _ = random_inputs(0)
    first, second = quantize_block_fp8(gate_up.view(2 * EXPERTS, WIDTH, HIDDEN)), quantize_block_fp8(down)
    scales = ExpertScales(first.scale_inv.view(EXPERTS, 2, 1), second.scale_inv)
    return first.values.view(gate_up.shape), second.values, scales


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_gradient_passes_fp8_experts(backend: str) -> None:
    x, _, _, weights, experts = random_inputs(3)
    gate_up, down, scales = fp8_weights()
    with use(backend), pytest.raises(InputError, match="for inference"):
        swiglu_experts(x.requires_grad_(), gate_up, down, weights, experts, scales)


def test_fp8_experts_come_with_scales_that_fit_and_others_without() -> None:
    x, plain_up, plain_down, weights, experts = random_inputs(3)
    gate_up, down, scales = fp8_weights()
    with pytest.raises(InputError, match="scales are missing"):
        swiglu_experts(x, gate_up, down, weights, experts)
    with pytest.raises(InputError, match="scales are given"):
        swiglu_experts(x, plain_up, plain_down, weights, experts, scales)
    with pytest.raises(InputError, match=r"need \[6, 2, 1\] and \[6, 1, 1\]"):
        swiglu_experts(x, gate_up, down, weights, experts, ExpertScales(scales.down, scales.down))


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


@pytest.mark.parametrize("tokens", [1, 25])
def test_inputs_stay_and_a_second_run_is_identical(tokens: int) -> None:
    assert_pure(swiglu_experts, random_inputs(tokens))

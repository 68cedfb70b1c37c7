"""The kernels of routing against their definition."""

import pytest
import torch
from tests.ops.checks import relative_error, tolerance
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.routing import Routing, route


def routed(backend: str, x: Tensor, gate: Tensor, top_k: int, normalize: bool, experts: Tensor | None) -> Routing:
    with use(backend):
        return route(x, gate, top_k, normalize, experts)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "count", "top_k"), [(1, 512, 10), (0, 8, 2), (37, 5, 5), (9, 33, 1), (3, 700, 4)])
def test_equals_the_definition(tokens: int, count: int, top_k: int, normalize: bool, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    x, gate = torch.randn(tokens, 24), torch.randn(count, 24) / 3
    with torch.no_grad():
        result, expected = (routed(name, x, gate, top_k, normalize, None) for name in ("triton", "reference"))
    torch.testing.assert_close(result.logits, expected.logits)
    torch.testing.assert_close(result.probabilities, expected.probabilities)
    # Two probabilities that differ in their last bit may change places.
    torch.testing.assert_close(result.weights, expected.weights)
    torch.testing.assert_close(
        result.probabilities.gather(1, result.experts), expected.probabilities.gather(1, expected.experts)
    )
    assert all(len(set(row)) == top_k for row in result.experts.tolist())


def test_of_equal_scores_the_first_experts_are_taken() -> None:
    with torch.no_grad():
        result = routed("triton", torch.ones(2, 4), torch.zeros(9, 4), 3, True, None)
    assert result.experts.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(result.weights, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_definition(
    dtype: torch.dtype, normalize: bool, given: bool, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    tokens, count, top_k = 21, 12, 3
    floats = [torch.randn(tokens, 16).to(dtype), (torch.randn(count, 16) / 4).to(dtype)]
    experts = torch.rand(tokens, count).topk(top_k).indices
    weights, probabilities = torch.randn(tokens, top_k), torch.randn(tokens, count)

    def gradients(backend: str, convert: torch.dtype, choice: Tensor | None) -> tuple[tuple[Tensor, ...], Routing]:
        leaves = [x.to(convert).requires_grad_() for x in floats]
        routing = routed(backend, *leaves, top_k, normalize, choice)
        loss = (routing.weights.float() * weights).sum() + (routing.probabilities * probabilities).sum()
        return torch.autograd.grad(loss + routing.logits.float().square().sum(), leaves), routing

    result, routing = gradients("triton", dtype, experts if given else None)
    expected, _ = gradients("reference", torch.float32, routing.experts)
    assert (routing.experts == experts).all() or not given
    for a, b in zip(result, expected, strict=True):
        assert relative_error(a, b) <= tolerance("route", dtype)[1]


def test_a_gradient_of_the_weights_alone_is_enough() -> None:
    gate = torch.randn(6, 8).requires_grad_()
    x = torch.randn(5, 8)
    result, expected = (
        torch.autograd.grad(routed(name, x, gate, 2, True, None).weights.square().sum(), gate)[0]
        for name in ("triton", "reference")
    )
    torch.testing.assert_close(result, expected)

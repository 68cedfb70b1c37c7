"""The products with a gate against their equations in fp64."""

import pytest
import torch
from tests.ops.checks import assert_pure, assert_same_gradients
from torch import Tensor

from qwen3_next.ops.gate import sigmoid_gate, swiglu


def by_sigmoid(x: Tensor, gate: Tensor) -> Tensor:
    return x.double() / (1 + (-gate.double()).exp())


def by_silu(gate: Tensor, up: Tensor) -> Tensor:
    return gate.double() / (1 + (-gate.double()).exp()) * up.double()


@pytest.mark.parametrize("shape", [(0, 2, 4), (3, 2, 5), (7, 1, 1)])
def test_both_are_their_equations(shape: tuple[int, ...], fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    a, b = torch.randn(shape) * 3, torch.randn(shape) * 3
    for run, oracle in ((sigmoid_gate, by_sigmoid), (swiglu, by_silu)):
        torch.testing.assert_close(run(a, b).double(), oracle(a, b), rtol=1e-5, atol=1e-6)
        assert_same_gradients(run, oracle, (a, b), 1e-5)


def test_bf16_rounds_the_factor_before_the_product(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    a, b = torch.randn(40, 3, 16).bfloat16(), torch.randn(40, 3, 16).bfloat16()
    sigmoid = (1 / (1 + (-b.double()).exp())).bfloat16()
    silu = (a.double() / (1 + (-a.double()).exp())).bfloat16()
    assert (sigmoid_gate(a, b) != a * sigmoid).double().mean() < 1e-2
    assert (swiglu(a, b) != silu * b).double().mean() < 1e-2


def test_inputs_stay_and_a_second_run_is_identical() -> None:
    for run in (sigmoid_gate, swiglu):
        assert_pure(run, (torch.randn(3, 2, 5), torch.randn(3, 2, 5)))

"""The kernels of the gates against their definitions."""

from collections.abc import Callable

import pytest
import torch
from tests.ops.checks import assert_pure, relative_error, tolerance
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops.backend import use
from qwen3_next.ops.gate import sigmoid_gate, swiglu

GATES = [("sigmoid_gate", sigmoid_gate), ("swiglu", swiglu)]
SHAPES = [(1, 16, 256), (0, 2, 4), (9, 3, 10), (2, 2500), (70, 1), (5, 3, 2, 7)]

Gate = Callable[[Tensor, Tensor], Tensor]


def run_with(backend: str, run: Gate, a: Tensor, b: Tensor) -> Tensor:
    with use(backend):
        return run(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "run"), GATES)
def test_equals_the_definition_and_so_do_the_gradients(
    name: str, run: Gate, shape: tuple[int, ...], dtype: torch.dtype, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    inputs = [(2 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(2)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    result, expected = run_with("triton", run, *inputs), run_with("reference", run, *wide)
    forward, gradient = tolerance(name, dtype)
    assert (result.shape, result.dtype) == (expected.shape, dtype)
    assert relative_error(result, expected) <= forward
    direction = torch.randn(shape).to(dtype)
    grads = torch.autograd.grad(result, inputs, direction, retain_graph=True)
    for a, b in zip(grads, torch.autograd.grad(expected, wide, direction.float()), strict=True):
        assert relative_error(a, b) <= gradient
    again = torch.autograd.grad(result, inputs, direction)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize(("name", "run"), GATES)
def test_fp16_is_rounded_where_the_definition_rounds(name: str, run: Gate, fresh_seed: int) -> None:
    """Of bf16 the interpreter rounds nothing to nearest."""
    torch.manual_seed(fresh_seed)
    a, b = torch.randn(40, 3, 16).half(), torch.randn(40, 3, 16).half()
    assert (run_with("triton", run, a, b) != run_with("reference", run, a, b)).double().mean() < 1e-2, name


@pytest.mark.parametrize(("name", "run"), GATES)
def test_rows_may_be_far_apart(name: str, run: Gate, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    a, b = torch.randn(7, 3, 20)[..., :10], torch.randn(7, 3, 20)[..., 10:]
    turned = torch.randn(10, 3, 7).transpose(0, 2)
    expected = run_with("triton", run, a.contiguous(), b.contiguous())
    assert torch.equal(run_with("triton", run, a, b), expected), name
    assert torch.equal(run_with("triton", run, b, a), run_with("triton", run, b.contiguous(), a.contiguous()))
    assert torch.equal(run_with("triton", run, turned, b), run_with("triton", run, turned.contiguous(), b))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("name", "run"), GATES)
def test_the_gradient_of_one_input_alone(name: str, run: Gate, which: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = [torch.randn(4, 2, 12) for _ in range(2)]
    wanted = inputs[which].requires_grad_()
    grads = [torch.autograd.grad(run_with(b, run, *inputs).sum(), wanted)[0] for b in ("reference", "triton")]
    assert relative_error(grads[1], grads[0]) <= tolerance(name, torch.float32)[1]


@pytest.mark.parametrize(("name", "run"), GATES)
def test_large_gates_stay_finite(name: str, run: Gate, on_device: str) -> None:
    largest = 80.0 if on_device == "cpu" else 1e4  # the interpreter's exponential warns where it becomes infinite
    ends = torch.tensor([[-largest, -50.0, 0.0, 50.0, largest]])
    for inputs in ((ends, ends), (torch.ones_like(ends), ends)):
        result, expected = run_with("triton", run, *inputs), run_with("reference", run, *inputs)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(("name", "run"), GATES)
def test_inputs_stay_and_a_second_run_is_identical(name: str, run: Gate, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    with use("triton"):
        assert_pure(run, (torch.randn(3, 2, 5), torch.randn(3, 2, 5)))


@pytest.mark.parametrize(("name", "run"), GATES)
def test_what_is_not_taken_is_said(name: str, run: Gate) -> None:
    x = torch.randn(2, 1, 4)
    with pytest.raises(BackendError, match=f"{name} does not take this: fp64"):
        run_with("triton", run, x.double(), x.double())
    with pytest.raises(BackendError, match="unlike shape or dtype"):
        run_with("triton", run, x, x.bfloat16())


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "run"), GATES)
def test_the_published_sizes(name: str, run: Gate, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    a, b = torch.randn(5001, 16, 256).bfloat16(), torch.randn(5001, 16, 512).bfloat16()[..., 256:]
    result, expected = run_with("triton", run, a, b), run_with("reference", run, a.float(), b.float())
    assert relative_error(result, expected) <= tolerance(name, torch.bfloat16)[0]

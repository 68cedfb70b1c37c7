"""The kernels of the rotary embedding against its definitions."""

import pytest
import torch
from tests.ops.checks import assert_pure, relative_error, tolerance
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops.backend import use
from qwen3_next.ops.rotary import apply_rotary, rms_norm_rotary

EPS = 1e-6
SIZES = [(0, 2, 16, 4), (1, 16, 256, 32), (7, 3, 10, 3), (33, 2, 16, 8), (5, 1, 100, 1), (9, 2, 12, 6)]
"""T, H, Dh, R."""


class Inputs:
    """Heads that lie beside others as queries beside their gates, a weight, and tables."""

    def __init__(self, tokens: int, heads: int, width: int, half: int, dtype: torch.dtype) -> None:
        self.wide = torch.randn(tokens, heads, 2 * width).to(dtype)
        self.x, self.weight = self.wide[..., :width], (torch.randn(width) / 2).to(dtype)
        angles = torch.rand(tokens, 1, half) * 6
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def rotated(self, dtype: torch.dtype, backend: str, x: Tensor | None = None) -> Tensor:
        with use(backend):
            return apply_rotary((self.x if x is None else x).to(dtype), self.cos.to(dtype), self.sin.to(dtype))

    def normed(self, dtype: torch.dtype, backend: str, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        x, weight = self.x if x is None else x, self.weight if weight is None else weight
        with use(backend):
            tables = self.cos.to(dtype), self.sin.to(dtype)
            return rms_norm_rotary(x.to(dtype), weight.to(dtype), EPS, *tables)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_both_equal_their_definitions(sizes: tuple[int, int, int, int], dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(*sizes, dtype)
    for name, run in (("apply_rotary", inputs.rotated), ("rms_norm_rotary", inputs.normed)):
        result, expected = run(dtype, "triton"), run(torch.float32, "reference")
        assert (result.shape, result.dtype) == (expected.shape, dtype)
        assert relative_error(result, expected) <= tolerance(name, dtype)[0]


def test_fp16_is_rounded_where_the_definitions_round(fresh_seed: int) -> None:
    """Of bf16 the interpreter rounds nothing to nearest."""
    torch.manual_seed(fresh_seed)
    inputs = Inputs(20, 3, 32, 8, torch.float16)
    for run in (inputs.rotated, inputs.normed):
        differ = run(torch.float16, "triton") != run(torch.float16, "reference")
        assert differ.double().mean() < 1e-2, "more than rounding ties differ"


def test_what_does_not_turn_passes(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(6, 2, 20, 4, torch.bfloat16)
    assert torch.equal(inputs.rotated(torch.bfloat16, "triton")[..., 8:], inputs.x[..., 8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_those_of_the_definitions(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(*sizes, dtype)
    leaves = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    wide = [x.detach().float().requires_grad_() for x in leaves]
    direction = torch.randn(inputs.x.shape).to(dtype)
    result, expected = inputs.normed(dtype, "triton"), inputs.normed(torch.float32, "reference", *wide)
    grads = torch.autograd.grad(result, leaves, direction, retain_graph=True)
    for a, b in zip(grads, torch.autograd.grad(expected, wide, direction.float()), strict=True):
        assert relative_error(a, b) <= tolerance("rms_norm_rotary", dtype)[1]
    again = torch.autograd.grad(result, leaves, direction)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))

    grad = torch.autograd.grad(inputs.rotated(dtype, "triton"), inputs.x, direction)[0]
    expected = inputs.rotated(torch.float32, "reference", wide[0])
    other = torch.autograd.grad(expected, wide[0], direction.float())[0]
    assert relative_error(grad, other) <= tolerance("apply_rotary", dtype)[1]


@pytest.mark.parametrize("which", [0, 1])
def test_the_gradient_of_one_input_alone(which: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(6, 2, 20, 4, torch.float32)
    wanted = (inputs.x, inputs.weight)[which].requires_grad_()
    grads = [
        torch.autograd.grad(inputs.normed(torch.float32, backend).square().sum(), wanted)[0]
        for backend in ("reference", "triton")
    ]
    assert relative_error(grads[1], grads[0]) <= tolerance("rms_norm_rotary", torch.float32)[1]


def test_inputs_stay_and_a_second_run_is_identical(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(5, 2, 8, 2, torch.float32)
    with use("triton"):
        assert_pure(apply_rotary, (inputs.wide, inputs.cos, inputs.sin))
        assert_pure(lambda *args: rms_norm_rotary(args[0], args[1], EPS, *args[2:]), list(_tensors(inputs)))


def _tensors(inputs: Inputs) -> tuple[Tensor, ...]:
    return inputs.x, inputs.weight, inputs.cos, inputs.sin


def test_what_is_not_taken_is_said() -> None:
    inputs = Inputs(2, 1, 8, 2, torch.bfloat16)
    with use("triton"):
        with pytest.raises(BackendError, match="tables of another dtype"):
            apply_rotary(inputs.x, inputs.cos.float(), inputs.sin.float())
        with pytest.raises(BackendError, match="gradients of the tables"):
            rms_norm_rotary(inputs.x, inputs.weight, EPS, inputs.cos.requires_grad_(), inputs.sin)
    with pytest.raises(BackendError, match="fp64"):
        inputs.rotated(torch.float64, "triton")


@pytest.mark.gpu
def test_the_published_sizes(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = Inputs(5001, 16, 256, 32, torch.bfloat16)
    leaves = inputs.x.requires_grad_(), inputs.weight.requires_grad_()
    wide = [x.detach().float().requires_grad_() for x in leaves]
    result, expected = inputs.normed(torch.bfloat16, "triton"), inputs.normed(torch.float32, "reference", *wide)
    forward, gradient = tolerance("rms_norm_rotary", torch.bfloat16)
    assert relative_error(result, expected) <= forward
    grads = torch.autograd.grad(result.sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert relative_error(a, b) <= gradient

"""The kernels of the norms against their definitions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ops.checks import assert_pure, relative_error, tolerance
from torch import Tensor

from qwen3_next.errors import BackendError
from qwen3_next.ops.backend import use
from qwen3_next.ops.norm import add_rms_norm, gated_rms_norm, rms_norm

EPS = 1e-6
SHAPES = [(1, 2048), (0, 8), (3, 2, 31), (37, 128), (5, 257), (70, 1), (2, 16384)]

Run = Callable[..., Tensor | tuple[Tensor, ...]]


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def added(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return add_rms_norm(x, residual, weight, EPS)


def gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    return gated_rms_norm(x, gate, weight, EPS)


NORMS: list[tuple[str, Run, int]] = [("rms_norm", plain, 1), ("add_rms_norm", added, 2), ("gated_rms_norm", gated, 2)]
"""Name, operation, and how many inputs have rows."""


def rows(shape: tuple[int, ...], count: int, dtype: torch.dtype) -> list[Tensor]:
    return [*(torch.randn(shape).to(dtype) for _ in range(count)), torch.randn(shape[-1]).to(dtype)]


def results(run: Run, inputs: list[Tensor], backend: Any) -> list[Tensor]:
    with use(backend):
        result = run(*inputs)
    return [result] if isinstance(result, Tensor) else list(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "run", "count"), NORMS)
def test_equals_the_definition(
    name: str, run: Run, count: int, shape: tuple[int, ...], dtype: torch.dtype, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    inputs = rows(shape, count, dtype)
    expected = results(run, [x.float() for x in inputs], "reference")
    for result, other in zip(results(run, inputs, "triton"), expected, strict=True):
        assert (result.shape, result.dtype) == (other.shape, dtype)
        assert relative_error(result, other) <= tolerance(name, dtype)[0]


@pytest.mark.parametrize(("name", "run", "count"), NORMS)
def test_fp16_is_rounded_where_the_definition_rounds(name: str, run: Run, count: int, fresh_seed: int) -> None:
    """Of bf16 the interpreter rounds nothing to nearest."""
    torch.manual_seed(fresh_seed)
    inputs = rows((64, 128), count, torch.float16)
    for result, expected in zip(results(run, inputs, "triton"), results(run, inputs, "reference"), strict=True):
        assert (result != expected).double().mean() < 1e-2, "more than rounding ties differ"


def test_the_stream_is_the_sum(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    x, residual, weight = rows((9, 40), 2, torch.float16)
    with use("triton"):
        assert torch.equal(add_rms_norm(x, residual, weight, EPS).stream, x + residual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 130), (500, 12), (2, 2048), (0, 8), (1, 3)])
@pytest.mark.parametrize(("name", "run", "count"), NORMS)
def test_gradients_are_those_of_the_definition(
    name: str, run: Run, count: int, shape: tuple[int, ...], dtype: torch.dtype, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    inputs = [x.requires_grad_() for x in rows(shape, count, dtype)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    result, expected = results(run, inputs, "triton"), results(run, wide, "reference")
    directions = [torch.randn_like(x).to(dtype) for x in expected]
    grads = torch.autograd.grad(result, inputs, directions, retain_graph=True)
    for a, b in zip(grads, torch.autograd.grad(expected, wide, [x.float() for x in directions]), strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) <= tolerance(name, dtype)[1]
    again = torch.autograd.grad(result, inputs, directions)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(("name", "run", "count"), NORMS)
def test_the_gradient_of_one_input_alone(name: str, run: Run, count: int, which: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = rows((11, 20), count, torch.float32)
    wanted = inputs[which % len(inputs)].requires_grad_()
    grads = [torch.autograd.grad(results(run, inputs, b)[0].sum(), wanted)[0] for b in ("reference", "triton")]
    assert relative_error(grads[1], grads[0]) <= tolerance(name, torch.float32)[1]


def test_the_gradient_of_the_stream_alone(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    x, residual, weight = (x.requires_grad_() for x in rows((4, 20), 2, torch.float32))
    with use("triton"):
        stream = add_rms_norm(x, residual, weight, EPS).stream
    direction = torch.randn_like(stream)
    grads = torch.autograd.grad(stream, (x, residual, weight), direction, allow_unused=True)
    assert torch.equal(grads[0], direction)
    assert torch.equal(grads[1], direction)
    assert grads[2] is None or not grads[2].any()


def test_rows_may_be_far_apart(fresh_seed: int) -> None:
    """Those of `gate` inside groups of a projection, of which two strides tell where they begin."""
    torch.manual_seed(fresh_seed)
    x, projected, weight = torch.randn(5, 3, 2, 12), torch.randn(5, 3 * 40), torch.randn(12)
    gate = projected.unflatten(-1, (3, 40))[..., 16:].unflatten(-1, (2, 12))
    turned = torch.randn(12, 7).T
    with use("triton"):
        assert torch.equal(gated(x, gate, weight), gated(x, gate.contiguous(), weight))
        assert torch.equal(gated(gate, x, weight), gated(gate.contiguous(), x, weight))
        assert torch.equal(plain(gate, weight), plain(gate.contiguous(), weight))
        assert torch.equal(plain(gate.transpose(0, 2), weight), plain(gate, weight).transpose(0, 2))
        assert torch.equal(plain(turned, weight), plain(turned.contiguous(), weight))
        assert torch.equal(plain(x[:1, :1, :1].expand(4, 2, 3, 12), weight)[2, 1, 1], plain(x, weight)[0, 0, 0])


def test_gradients_of_rows_far_apart(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    x, projected, weight = torch.randn(5, 3, 2, 12), torch.randn(5, 3 * 40).requires_grad_(), torch.randn(12)
    grads: list[Tensor] = []
    for backend in ("reference", "triton"):
        with use(backend):
            gate = projected.unflatten(-1, (3, 40))[..., 16:].unflatten(-1, (2, 12))
            result = gated(x, gate, weight) + gated(gate, x, weight)
        grads.append(torch.autograd.grad(result.square().sum(), projected)[0])
    assert relative_error(grads[1], grads[0]) <= 2 * tolerance("gated_rms_norm", torch.float32)[1]


@pytest.mark.parametrize(("name", "run", "count"), NORMS)
def test_inputs_stay_and_a_second_run_is_identical(name: str, run: Run, count: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    inputs = rows((9, 24), count, torch.bfloat16)
    with use("triton"):
        for index in range(len(results(run, inputs, "triton"))):
            assert_pure(lambda *tensors, index=index: results(run, list(tensors), "triton")[index], inputs)


def test_a_weight_in_fp32_is_taken(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    x, gate = (torch.randn(6, 24).half() for _ in range(2))
    weight = torch.randn(24)
    for run in (lambda: plain(x, weight), lambda: gated(x, gate, weight)):
        result, expected = results(run, [], "triton")[0], results(run, [], "reference")[0]
        assert result.dtype == torch.float16
        assert (result != expected).double().mean() < 2e-2


def test_what_is_not_taken_is_said() -> None:
    x, weight = torch.randn(2, 8), torch.randn(8)
    with use("triton"):
        with pytest.raises(BackendError, match="fp64"):
            plain(x.double(), weight.double())
        with pytest.raises(BackendError, match="unlike shape or dtype"):
            added(x, x.bfloat16(), weight)
        with pytest.raises(BackendError, match="more than 16,384"):
            plain(torch.randn(1, 16385), torch.randn(16385))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "run", "count"), NORMS)
def test_the_published_sizes(name: str, run: Run, count: int, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    shape = (3001, 32, 128) if name == "gated_rms_norm" else (9001, 2048)
    inputs = [x.requires_grad_() for x in rows(shape, count, torch.bfloat16)]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    result, expected = results(run, inputs, "triton"), results(run, wide, "reference")
    grads = torch.autograd.grad([x.sum() for x in result], inputs)
    forward, gradient = tolerance(name, torch.bfloat16)
    assert max(relative_error(a, b) for a, b in zip(result, expected, strict=True)) <= forward
    for a, b in zip(grads, torch.autograd.grad([x.sum() for x in expected], wide), strict=True):
        assert relative_error(a, b) <= gradient

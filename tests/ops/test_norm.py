"""Both norms against their equations in fp64, and their rounding against the published model's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ops.checks import assert_pure, assert_same_gradients, relative_error
from torch import Tensor

from qwen3_next.ops.norm import add_rms_norm, gated_rms_norm, rms_norm

EPS = 1e-6

shapes = st.tuples(st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 2, 3, 31, 64, 129, 257]))


def zero_centred(x: Tensor, weight: Tensor) -> Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + weight)


def gated(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    x, gate, weight = x.double(), gate.double(), weight.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight * gate / (1 + (-gate).exp())


@settings(max_examples=30, deadline=None)
@given(shapes, st.sampled_from([1e-4, 1.0, 1e4]))
def test_both_norms_are_their_equations(shape: tuple[int, ...], size: float) -> None:
    x, gate, weight = torch.randn(shape) * size, torch.randn(shape), torch.randn(shape[-1])
    torch.testing.assert_close(rms_norm(x, weight, EPS).double(), zero_centred(x, weight), rtol=1e-5, atol=1e-6)
    result = gated_rms_norm(x, gate, weight, EPS)
    torch.testing.assert_close(result.double(), gated(x, gate, weight), rtol=1e-5, atol=1e-6)


def test_a_weight_of_zero_leaves_the_length_of_the_zero_centred_norm_at_one() -> None:
    normed = rms_norm(torch.randn(5, 40) + 3, torch.zeros(40), 0.0)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(5))


def test_a_row_of_zeros_stays_zero() -> None:
    zeros, weight = torch.zeros(2, 8), torch.randn(8)
    assert torch.equal(rms_norm(zeros, weight, EPS), zeros)
    assert torch.equal(gated_rms_norm(zeros, torch.randn(2, 8), weight, EPS).abs(), zeros)


@pytest.mark.parametrize("width", [7, 64, 129])
def test_bf16_zero_centred_norm_is_rounded_once_at_the_end(width: int) -> None:
    x, weight = torch.randn(33, width).bfloat16(), torch.randn(width).bfloat16()
    expected = zero_centred(x, weight).bfloat16()
    result = rms_norm(x, weight, EPS)
    assert result.dtype == torch.bfloat16
    assert (result != expected).double().mean() < 1e-2, "more than rounding ties differ"


@pytest.mark.parametrize("width", [7, 64, 129])
def test_bf16_gated_norm_rounds_where_the_published_model_does(width: int) -> None:
    x, gate, weight = (
        torch.randn(33, width).bfloat16(),
        torch.randn(33, width).bfloat16(),
        torch.randn(width).bfloat16(),
    )
    normed = (x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt()).bfloat16()
    expected = ((normed * weight).double() * gate.double() / (1 + (-gate.double()).exp())).bfloat16()
    assert (gated_rms_norm(x, gate, weight, EPS) != expected).double().mean() < 1e-2
    rounded_late = gated(x, gate, weight).bfloat16()
    assert (rounded_late != expected).double().mean() > 0.1, "the test could not tell the two roundings apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_equations(dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    x, gate, weight = torch.randn(9, 33).to(dtype), torch.randn(9, 33).to(dtype), torch.randn(33).to(dtype)
    assert_same_gradients(lambda *args: rms_norm(*args, EPS), zero_centred, (x, weight), tolerance)
    assert_same_gradients(lambda *args: gated_rms_norm(*args, EPS), gated, (x, gate, weight), tolerance)


def test_the_norm_after_an_addition_is_that_of_the_rounded_sum() -> None:
    x, residual, weight = (torch.randn(shape).bfloat16() for shape in ((5, 40), (5, 40), 40))
    normed, stream = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(stream, x + residual)
    assert torch.equal(normed, rms_norm(stream, weight, EPS))
    assert normed.dtype == stream.dtype == torch.bfloat16


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    x, gate, weight = torch.randn(6, 4, 20)[:, ::2], torch.randn(2, 6, 20).transpose(0, 1), torch.randn(20)
    assert relative_error(rms_norm(x, weight, EPS), zero_centred(x, weight)) < 1e-6
    assert relative_error(gated_rms_norm(x, gate, weight, EPS), gated(x, gate, weight)) < 1e-6


def test_inputs_stay_and_a_second_run_is_identical() -> None:
    assert_pure(lambda *args: rms_norm(*args, EPS), (torch.randn(3, 5), torch.randn(5)))
    assert_pure(lambda *args: gated_rms_norm(*args, EPS), (torch.randn(3, 5), torch.randn(3, 5), torch.randn(5)))

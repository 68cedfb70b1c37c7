"""The fp8 kernels against their definitions, bit by bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.ops.checks import poisoned
from torch import Tensor

from qwen3_next.errors import BackendError, InputError
from qwen3_next.ops.backend import Backend, use
from qwen3_next.ops.quant import dequantize_block_fp8, quantize_activations, quantize_block_fp8
from qwen3_next.ops.quant_triton import quantize_into

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def run_with(backend: Backend, run: Callable[..., Any], *inputs: Any) -> Any:
    with use(backend), poisoned():
        return run(*inputs)


def assert_same_bits(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert all((x.shape, x.dtype) == (y.shape, y.dtype) for x, y in zip(a, b, strict=True))
    codes = [x[0].view(torch.uint8) for x in (a, b)]
    assert torch.equal(*(code.masked_fill(code == 0x80, 0) for code in codes)), "values"  # zero may lose its sign
    assert torch.equal(a[1], b[1]), "scales"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (1, 128), (3, 1), (35, 300), (70, 256)])
def test_activations_have_the_bits_of_the_definition(
    shape: tuple[int, int], dtype: torch.dtype, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    x = (torch.randn(shape) * torch.logspace(-4, 4, max(1, shape[0]))[: shape[0], None]).to(dtype)
    expected = run_with("reference", quantize_activations, x)
    assert_same_bits(run_with("triton", quantize_activations, x), expected)
    assert_same_bits(run_with("triton", quantize_activations, x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5), (128, 128), (130, 300), (3, 1, 200), (2, 2, 129, 70)])
def test_weights_have_the_bits_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    weight = torch.randn(shape).to(dtype)
    assert_same_bits(run_with("triton", quantize_block_fp8, weight), run_with("reference", quantize_block_fp8, weight))


def test_every_code_and_the_middle_between_two_are_rounded_alike() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[1:] + codes[:-1]) / 2
    below, above = torch.nextafter(middles, torch.zeros(())), torch.nextafter(middles, torch.full((), 500.0))
    values = torch.cat([codes, middles, below, above])
    x = torch.stack([torch.cat([values, -values]), torch.full((2 * len(values),), 448.0)], dim=1)  # all scales are 1
    result = run_with("triton", quantize_activations, x)
    assert_same_bits(result, run_with("reference", quantize_activations, x))
    assert torch.equal(result.values[: len(codes), 0].float(), codes)


def test_zeros_have_the_scale_one_and_nan_stays() -> None:
    x = torch.zeros(2, 256)
    x[1, 200] = torch.nan
    values, scales = run_with("triton", quantize_activations, x)
    assert torch.equal(scales[:1], torch.ones(1, 2))
    assert values.float().isnan()[1, 200]  # whatever else its tile becomes
    assert torch.equal(values.float()[:1], x[:1])


def test_rows_may_be_far_apart_and_scales_lie_by_channel(fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    wide = torch.randn(20, 600)
    for x in (wide[:, :300], wide[:, 300:], wide.t()[:, :16]):
        expected = run_with("reference", quantize_activations, x)
        values = torch.zeros(len(x) + 4, x.shape[1]).to(torch.float8_e4m3fn)
        scales = torch.full((expected.scales.shape[1], len(x) + 4), -1.0).t()
        quantize_into(x, values, scales)
        assert_same_bits((values[: len(x)], scales[: len(x)]), expected)
        assert torch.equal(scales[len(x) :], torch.full_like(scales[len(x) :], -1.0))
        assert not values[len(x) :].float().any()


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (130, 300), (256, 128)])
def test_dequantised_weights_are_the_definitions(
    shape: tuple[int, int], scale_dtype: torch.dtype, on_device: str, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    weight, scales = run_with("reference", quantize_block_fp8, torch.randn(shape))
    inputs = (weight, scales.to(scale_dtype))
    for dtype in [torch.float32, *([] if on_device == "cpu" else [torch.bfloat16])]:  # the interpreter cuts bf16 off
        result, expected = (run_with(b, dequantize_block_fp8, *inputs, dtype) for b in ("triton", "reference"))
        assert torch.equal(result, expected)


def test_what_is_not_taken_is_said() -> None:
    for run in (quantize_activations, quantize_block_fp8):
        with pytest.raises(BackendError, match="fp64"):
            run_with("triton", run, torch.ones(2, 2).double())
    weight, scales = run_with("reference", quantize_block_fp8, torch.ones(130, 5))
    with pytest.raises(BackendError, match="fp64"):
        run_with("triton", dequantize_block_fp8, weight, scales, torch.float64)
    for inputs, reason in (((weight.float(), scales), "float8_e4m3fn"), ((weight, scales[:1]), r"needs \[2, 1\]")):
        with pytest.raises(InputError, match=reason):
            run_with("triton", dequantize_block_fp8, *inputs, torch.float32)

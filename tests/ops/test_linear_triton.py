"""The kernels of the linear layer against its definition."""

from typing import Any

import pytest
import torch
from tests.ops.checks import assert_pure, poisoned, relative_error, tolerance
from torch import Tensor

from qwen3_next.errors import BackendError, InputError
from qwen3_next.ops import linear_triton
from qwen3_next.ops.backend import Backend, use
from qwen3_next.ops.linear import linear
from qwen3_next.ops.quant import quantize_block_fp8

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOKENS = [0, 1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 130]


def run_with(backend: Backend, *inputs: Any) -> Tensor:
    with use(backend), poisoned():
        return linear(*inputs)


def weights(rows: int, columns: int, dtype: torch.dtype, fp8: bool) -> tuple[Tensor, Tensor | None]:
    weight = torch.randn(rows, columns) / columns**0.5
    if not fp8:
        return weight.to(dtype), None
    with use("reference"):
        return quantize_block_fp8(weight)


def assert_defined(x: Tensor, weight: Tensor, scale_inv: Tensor | None, bias: Tensor | None = None) -> None:
    result = run_with("triton", x, weight, scale_inv, bias)
    wide = None if bias is None else bias.float()
    expected = run_with("reference", x.float(), weight if scale_inv is not None else weight.float(), scale_inv, wide)
    assert (result.shape, result.dtype) == (expected.shape, x.dtype)
    assert relative_error(result, expected) <= tolerance("linear", x.dtype)[0]
    assert torch.equal(result, run_with("triton", x, weight, scale_inv, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_equals_the_definition(
    tokens: int, fp8: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, fresh_seed: int
) -> None:
    torch.manual_seed(fresh_seed)
    monkeypatch.setattr(linear_triton, "FEW_ROWS", 0)  # so that even this small weight does not meet cuBLAS
    x = torch.randn(tokens, 600)[:, 300:].to(dtype)
    assert_defined(x, *weights(131, 300, dtype, fp8), torch.randn(131).to(dtype))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [2, 7, 70])
@pytest.mark.parametrize("shape", [(1, 1), (130, 8), (64, 128), (3, 256), (257, 127)])
def test_weights_of_any_size(shape: tuple[int, int], tokens: int, fp8: bool, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    assert_defined(torch.randn(tokens, shape[1]), *weights(*shape, torch.float32, fp8))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [(300,), (2, 3, 300), (2, 0, 300)])
def test_any_number_of_dimensions(shape: tuple[int, ...], fp8: bool, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    assert_defined(torch.randn(shape), *weights(40, 300, torch.float32, fp8))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 70])
def test_rows_may_be_far_apart(tokens: int, fp8: bool, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    wide, turned = torch.randn(tokens, 600), torch.randn(300, tokens).t()
    weight, scale_inv = weights(50, 300, torch.float32, fp8)
    apart = torch.cat([weight.float(), weight.float()], dim=1).to(weight.dtype)[:, :300]
    for x in (wide[:, 300:], wide[:, ::2], turned):
        result = run_with("triton", x, apart, scale_inv)
        expected = run_with("triton", x.contiguous(), weight, scale_inv)
        assert relative_error(result, expected) <= tolerance("linear", x.dtype)[0]


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_torch(tokens: int, dtype: torch.dtype, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    x, weight, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((tokens, 24), (10, 24), (10,)))
    results = [run_with(backend, x, weight, None, bias) for backend in ("triton", "reference")]
    grads = [torch.autograd.grad(result.sum(), (x, weight, bias)) for result in results]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("tokens", [3, 9, 70])
def test_a_bad_token_spoils_no_other(tokens: int, on_device: str, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    weight, scale_inv = weights(40, 300, torch.float32, True)
    x = torch.randn(tokens, 300)
    clean = run_with("triton", x, weight, scale_inv)
    x[1, 200] = torch.nan
    result = run_with("triton", x, weight, scale_inv)
    others = torch.arange(tokens) != 1
    assert on_device == "cpu" or result[1].isnan().all()  # the interpreter multiplies the code of NaN as a number
    assert torch.equal(result[others], clean[others])


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [2, 9, 70])
def test_inputs_stay_and_a_second_run_is_identical(tokens: int, fp8: bool, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    weight, scale_inv = weights(20, 130, torch.float32, fp8)
    with use("triton"):
        assert_pure(lambda x: linear(x, weight, scale_inv), (torch.randn(tokens, 130),))


def test_what_is_not_taken_is_said() -> None:
    x, (weight, scale_inv) = torch.ones(2, 4), weights(3, 4, torch.float32, True)
    with pytest.raises(BackendError, match="fp64"):
        run_with("triton", x.double(), torch.ones(3, 4).double())
    with pytest.raises(BackendError, match="another dtype"):
        run_with("triton", x, torch.ones(3, 4).bfloat16())
    with pytest.raises(InputError, match=r"needs \[1, 1\]"):
        run_with("triton", x, weight, torch.ones(2, 1))
    with pytest.raises(InputError, match="for inference"):
        run_with("triton", x.requires_grad_(), weight, scale_inv)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 16, 40, 64, 65, 1001])
@pytest.mark.parametrize("shape", [(12288, 2048), (2048, 4096), (3000, 2048)])
def test_the_published_sizes(shape: tuple[int, int], tokens: int, fp8: bool, fresh_seed: int) -> None:
    torch.manual_seed(fresh_seed)
    assert_defined(torch.randn(tokens, shape[1]).bfloat16(), *weights(*shape, torch.bfloat16, fp8))

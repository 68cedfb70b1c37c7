"""Comparisons that several tests of operations share."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

TOLERANCES: dict[tuple[str, str], tuple[float, float]] = {
    # (operation, dtype of the inputs): largest relative error of the outputs, of the gradients, against fp32 or fp64
    ("add_rms_norm", "float32"): (1e-6, 3e-6),
    ("add_rms_norm", "float16"): (1e-3, 1.5e-3),
    ("add_rms_norm", "bfloat16"): (1.2e-2, 1.2e-2),
    ("apply_rotary", "float32"): (1e-6, 1e-6),
    ("apply_rotary", "float16"): (8e-4, 8e-4),
    ("apply_rotary", "bfloat16"): (1e-2, 1e-2),
    ("causal_conv", "float32"): (1e-6, 2e-6),
    ("causal_conv", "bfloat16"): (6e-3, 8e-3),
    ("delta_net_step_", "float32"): (5e-6, 0.0),
    ("delta_net_step_", "bfloat16"): (1e-2, 0.0),
    ("gated_delta_rule", "float32"): (1e-5, 2e-5),
    ("gated_delta_rule", "float16"): (2e-3, 4e-3),
    ("gated_delta_rule", "bfloat16"): (1e-2, 2e-2),
    ("gated_rms_norm", "float32"): (1e-6, 3e-6),
    ("gated_rms_norm", "float16"): (1e-3, 1.5e-3),
    ("gated_rms_norm", "bfloat16"): (1.2e-2, 1.2e-2),
    ("linear", "float32"): (2e-6, 2e-6),
    ("linear", "float16"): (1e-3, 1e-3),
    ("linear", "bfloat16"): (1e-2, 1e-2),
    ("linear_cross_entropy", "float32"): (2e-6, 1e-5),
    ("linear_cross_entropy", "float16"): (1e-5, 0.0),
    ("linear_cross_entropy", "bfloat16"): (1e-5, 8e-3),
    ("paged_attention", "float32"): (2e-6, 0.0),
    ("paged_attention", "float16"): (1.5e-3, 0.0),
    ("paged_attention", "bfloat16"): (1e-2, 0.0),
    ("rms_norm", "float32"): (1e-6, 3e-6),
    ("rms_norm", "float16"): (1e-3, 1.5e-3),
    ("rms_norm", "bfloat16"): (1.2e-2, 1.2e-2),
    ("rms_norm_rotary", "float32"): (1e-6, 3e-6),
    ("rms_norm_rotary", "float16"): (1e-3, 1.5e-3),
    ("rms_norm_rotary", "bfloat16"): (1.2e-2, 1.2e-2),
    ("route", "float32"): (1e-5, 1e-5),
    ("route", "bfloat16"): (1e-2, 2.5e-2),
    ("sigmoid_gate", "float32"): (1e-6, 2e-6),
    ("sigmoid_gate", "float16"): (8e-4, 1e-3),
    ("sigmoid_gate", "bfloat16"): (1e-2, 1e-2),
    ("swiglu", "float32"): (1e-6, 2e-6),
    ("swiglu", "float16"): (8e-4, 1e-3),
    ("swiglu", "bfloat16"): (1e-2, 1e-2),
    ("swiglu_experts", "float32"): (1e-6, 2e-6),
    ("swiglu_experts", "bfloat16"): (1.5e-2, 2.5e-2),
    ("swiglu_experts", "float8_e4m3fn"): (4e-2, 0.0),
}
"""What a twin may differ from its definition by, as `|result - expected| / |expected|`."""


def tolerance(operation: str, dtype: torch.dtype) -> tuple[float, float]:
    """Of the outputs and of the gradients, from the table above."""
    return TOLERANCES[operation, str(dtype).removeprefix("torch.")]


@contextmanager
def poisoned() -> Generator[None, None, None]:
    """Inside, memory that nothing has written yet holds NaN, or the largest integer, on every device.

    Unwritten outputs of kernels thereby show, which the fill of torch's deterministic mode does on its own only where
    all other operations are deterministic too. Held at the functions that make uninitialised tensors.
    """
    _device_constructors()  # torch remembers once which functions a `with device` is for: the ones before the patch
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in _UNINITIALISED:
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


_UNINITIALISED = [
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
]


def _poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        return _poison(make(*args, **kwargs))

    return made


def _poison(x: Tensor) -> Tensor:
    with torch.no_grad():
        if x.is_floating_point() and x.element_size() == 1:
            x.view(torch.uint8).fill_(0x7F)
            return x
        if x.is_floating_point() or x.is_complex():
            return x.fill_(float("nan"))
        return x.fill_(True if x.dtype is torch.bool else torch.iinfo(x.dtype).max)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """`|result - expected| / |expected|`; NaN where anything is NaN, which is never small."""
    difference = (result.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp_min(1e-300)).item()


def assert_same_gradients(
    run: Callable[..., Tensor], oracle: Callable[..., Tensor], inputs: Sequence[Tensor], tolerance: float
) -> None:
    """The gradients of two functions of the same inputs along one random direction."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    result, expected = run(*inputs), oracle(*inputs)
    direction = torch.randn_like(expected)
    grads = torch.autograd.grad(result, inputs, direction.to(result.dtype))
    for a, b in zip(grads, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert relative_error(a, b) <= tolerance


def assert_pure(run: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """Inputs stay as they were, even where the result is written to; a second run gives the same bits."""
    copies = [x.clone() for x in inputs]
    with torch.no_grad():
        first, second = run(*inputs), run(*inputs)
        assert torch.equal(first, second)
        first.zero_()
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))

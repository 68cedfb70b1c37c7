"""Queries and keys on their way into attention: norm and rotation in one."""

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.operations.case import Case, Inputs
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.rotary import rms_norm_rotary

WIDTH, HALF, EPS = 256, 32, 1e-6


def cases() -> Iterator[Case]:
    """Of 16 query heads, which stand beside their gates, and of 2 key heads."""
    for heads in (16, 2):
        for tokens in (1, 64, 32_768):
            yield Case(
                operation="norm and rotation",
                shape=f"T={tokens:,}, {heads} heads",
                make=lambda tokens=tokens, heads=heads: _inputs(tokens, heads),
                ours=rms_norm_rotary,
                definition=_definition,
                timed_definition=_definition,
                read_bytes=2 * tokens * (heads * WIDTH + 2 * HALF),
                written_bytes=2 * tokens * heads * WIDTH,
                tolerance=6e-3,
                goal=1.3 if tokens == 32_768 else None,
                graph=tokens <= 64,
            )
    tokens, heads = 32_768, 16
    yield Case(
        operation="norm and rotation with gradients",
        shape=f"T={tokens:,}, {heads} heads",
        make=lambda: _inputs(tokens, heads),
        ours=_with_gradients,
        definition=_gradients_of_definition,
        timed_definition=_gradients_of_definition,
        read_bytes=2 * tokens * (3 * heads * WIDTH + 4 * HALF),
        written_bytes=2 * tokens * 2 * heads * WIDTH,
        tolerance=6e-3,
        goal=1.3,
    )


def _inputs(tokens: int, heads: int) -> Inputs:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    x = torch.randn(tokens, heads, (2 if heads == 16 else 1) * WIDTH, **options)[..., :WIDTH]
    angles = 6 * torch.rand(tokens, 1, HALF, device="cuda")
    return x, torch.randn(WIDTH, **options) / 4, EPS, angles.cos().bfloat16(), angles.sin().bfloat16()


def _with_gradients(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """The gradients of x and the weight, where every output has the gradient 1 / 64."""
    tensors = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    output = rms_norm_rotary(*tensors, eps, cos, sin)
    return torch.autograd.grad(output, tensors, torch.full_like(output, 1 / 64))


def _definition(*inputs: Any) -> Tensor:
    with use("reference"):
        return rms_norm_rotary(*inputs)


def _gradients_of_definition(*inputs: Any) -> tuple[Tensor, ...]:
    with use("reference"):
        return _with_gradients(*inputs)

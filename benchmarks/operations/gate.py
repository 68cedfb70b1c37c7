"""The products with a gate."""

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.operations.case import Case, Inputs, Run
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.gate import sigmoid_gate, swiglu

HEADS, WIDTH, EXPERT_WIDTH = 16, 256, 512


def cases() -> Iterator[Case]:
    """The gate of attention stands beside the query; gate and up of the shared expert alone."""
    for name, run, make, width in (
        ("sigmoid gate", sigmoid_gate, _heads, HEADS * WIDTH),
        ("SwiGLU", swiglu, _rows, EXPERT_WIDTH),
    ):
        for tokens in (1, 64, 32_768):
            yield Case(
                operation=name,
                shape=f"T={tokens:,}, {width:,} columns",
                make=lambda make=make, tokens=tokens: make(tokens),
                ours=run,
                definition=_definition(run),
                timed_definition=_definition(run),
                read_bytes=4 * tokens * width,
                written_bytes=2 * tokens * width,
                tolerance=5e-3,
                goal=1.3 if tokens == 32_768 else None,
                graph=tokens <= 64,
            )
        tokens = 32_768
        yield Case(
            operation=f"{name} with gradients",
            shape=f"T={tokens:,}, {width:,} columns",
            make=lambda make=make, tokens=tokens: make(tokens),
            ours=_with_gradients(run),
            definition=_definition(_with_gradients(run)),
            timed_definition=_definition(_with_gradients(run)),
            read_bytes=10 * tokens * width,
            written_bytes=6 * tokens * width,
            tolerance=6e-3,
            goal=1.3,
        )


def _heads(tokens: int) -> Inputs:
    return _normal(tokens, HEADS, WIDTH), _normal(tokens, HEADS, 2 * WIDTH)[..., WIDTH:]


def _rows(tokens: int) -> Inputs:
    return _normal(tokens, EXPERT_WIDTH), _normal(tokens, EXPERT_WIDTH)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _with_gradients(run: Run) -> Run:
    """The gradients of both inputs, where every output has the gradient 1 / 64."""

    def differentiated(*inputs: Tensor) -> tuple[Tensor, ...]:
        tensors = [x.detach().requires_grad_() for x in inputs]
        output = run(*tensors)
        return torch.autograd.grad(output, tensors, torch.full_like(output, 1 / 64))

    return differentiated


def _definition(run: Run) -> Run:
    def defined(*inputs: Any) -> Any:
        with use("reference"):
            return run(*inputs)

    return defined

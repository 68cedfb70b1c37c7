"""The norms, over whole prompts and for a few tokens, and their gradients."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.operations.case import Case, Inputs, Run
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.norm import add_rms_norm, gated_rms_norm, rms_norm

HIDDEN, KEY_HEADS, REPEATS, WIDTH, PROJECTED = 2_048, 16, 2, 128, 12_288
HEADS = KEY_HEADS * REPEATS * WIDTH
EPS = 1e-6
Make = Callable[[int], Inputs]


def cases() -> Iterator[Case]:
    """By operation: name, inputs of so many tokens, elements read and written per token."""
    for name, run, make, read, written in (
        ("norm", rms_norm, _rows(1), HIDDEN, HIDDEN),
        ("norm after an addition", add_rms_norm, _rows(2), 2 * HIDDEN, 2 * HIDDEN),
        ("gated norm", gated_rms_norm, _heads, 2 * HEADS, HEADS),
    ):
        for tokens in (1, 64, 32_768):
            yield Case(
                operation=name,
                shape=f"T={tokens:,}",
                make=lambda make=make, tokens=tokens: make(tokens),
                ours=run,
                definition=_definition(run),
                timed_definition=_definition(run),
                peers={"torch": _torch} if run is rms_norm else {},
                read_bytes=2 * tokens * read,
                written_bytes=2 * tokens * written,
                tolerance=5e-3,
                goal=1.2 if tokens == 32_768 else None,
                graph=tokens <= 64,
            )
        tokens, gradients = 32_768, _with_gradients(run)
        yield Case(
            operation=f"{name} with gradients",
            shape=f"T={tokens:,}",
            make=lambda make=make, tokens=tokens: make(tokens),
            ours=gradients,
            definition=_definition(gradients),
            timed_definition=_definition(gradients),
            # Forward, then the inputs (of an addition its sum) and the gradients of the outputs; gradients come out,
            # those of two summands as one.
            read_bytes=2 * tokens * (read + (3 * HIDDEN if run is add_rms_norm else read + written)),
            written_bytes=2 * tokens * (written + (HIDDEN if run is add_rms_norm else read)),
            tolerance=6e-3,
            goal=1.3,
        )


def _rows(count: int) -> Make:
    def make(tokens: int) -> Inputs:
        return *(_normal(tokens, HIDDEN) for _ in range(count)), _normal(HIDDEN) / 4, EPS

    return make


def _heads(tokens: int) -> Inputs:
    """The gate stands in the projection, beside query, key and value of its key head."""
    gate = _normal(tokens, PROJECTED).unflatten(-1, (KEY_HEADS, -1))[..., -REPEATS * WIDTH :]
    return _normal(tokens, KEY_HEADS, REPEATS, WIDTH), gate.unflatten(-1, (REPEATS, WIDTH)), _normal(WIDTH), EPS


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _with_gradients(run: Run) -> Run:
    """The gradients of all inputs, where every output has the gradient 1 / 64."""

    def differentiated(*inputs: Any) -> tuple[Tensor, ...]:
        tensors = [x.detach().requires_grad_() for x in inputs[:-1]]
        result = run(*tensors, inputs[-1])
        outputs = [result] if isinstance(result, Tensor) else list(result)
        return torch.autograd.grad(outputs, tensors, [torch.full_like(x, 1 / 64) for x in outputs])

    return differentiated


def _definition(run: Run) -> Run:
    def defined(*inputs: Any) -> Any:
        with use("reference"):
            return run(*inputs)

    return defined


def _torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, eps)

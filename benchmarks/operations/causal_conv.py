"""The causal convolution over whole prompts, read out of the projection, and with its gradients."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.operations.case import Case, Inputs, Run
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.causal_conv import ProjectionColumns, causal_conv
from qwen3_next.ops.segments import Segments

COLUMNS = ProjectionColumns(key_heads=16, value_heads=32, key_width=128, value_width=128)
CHANNELS, PROJECTED = 8_192, 12_288


def cases() -> Iterator[Case]:
    """Channels alone, as peers take them; then the projection, of which a third is not read; then the gradients."""
    for tokens in (4_096, 32_768):
        yield Case(
            operation="causal convolution",
            shape=f"T={tokens:,}, {CHANNELS:,} channels",
            make=lambda tokens=tokens: _inputs(tokens, CHANNELS),
            ours=_forward,
            definition=_definition(_forward),
            timed_definition=_definition(_forward),
            peers={"torch conv1d": _torch, "flash-linear-attention": _peer()},
            read_bytes=2 * tokens * CHANNELS,
            written_bytes=2 * tokens * CHANNELS,
            tolerance=5e-3,
            quoted=("flash-linear-attention", 557.0) if tokens == 32_768 else None,
            goal=1.3,
        )
    tokens = 32_768
    yield Case(
        operation="causal convolution of a projection",
        shape=f"T={tokens:,}, {CHANNELS:,} of {PROJECTED:,} columns",
        make=lambda: _inputs(tokens, PROJECTED, COLUMNS),
        ours=_forward,
        definition=_definition(_forward),
        timed_definition=_definition(_forward),
        read_bytes=2 * tokens * CHANNELS,
        written_bytes=2 * tokens * CHANNELS,
        tolerance=5e-3,
        goal=1.3,
    )
    yield Case(
        operation="causal convolution with gradients",
        shape=f"T={tokens:,}, {CHANNELS:,} channels",
        make=lambda: _inputs(tokens, CHANNELS),
        ours=_with_gradients,
        definition=_definition(_with_gradients),
        # Forward, then the inputs again and the gradient of the output, for the gradient of the inputs.
        read_bytes=6 * tokens * CHANNELS,
        written_bytes=4 * tokens * CHANNELS,
        tolerance=5e-3,
        goal=1.3,
    )


def _inputs(tokens: int, width: int, columns: ProjectionColumns | None = None) -> Inputs:
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(CHANNELS, 4, device="cuda", dtype=torch.bfloat16) / 2
    return x, weight, Segments.from_lengths([tokens], "cuda"), columns


def _forward(x: Tensor, weight: Tensor, segments: Segments, columns: ProjectionColumns | None) -> Tensor:
    return causal_conv(x, weight, segments, None, columns).output


def _with_gradients(
    x: Tensor, weight: Tensor, segments: Segments, columns: ProjectionColumns | None
) -> tuple[Tensor, ...]:
    """The gradients of x and the weight, where every output has the gradient 1 / 64."""
    tensors = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    output = _forward(*tensors, segments, columns)
    return torch.autograd.grad(output, tensors, torch.full_like(output, 1 / 64))


def _definition(run: Run) -> Run:
    def defined(*inputs: Any) -> Any:
        with use("reference"):
            return run(*inputs)

    return defined


def _torch(x: Tensor, weight: Tensor, segments: Segments, columns: None) -> Tensor:
    padded = F.pad(x.T[None], (3, 0))
    return F.silu(F.conv1d(padded, weight[:, None], groups=CHANNELS))[0].T


def _peer() -> Run | None:
    if find_spec("fla") is None:
        return None
    from fla.modules.convolution import causal_conv1d  # pyright: ignore[reportMissingImports]

    def run(x: Tensor, weight: Tensor, segments: Segments, columns: None) -> Any:
        return causal_conv1d(x[None], weight, activation="silu")[0]

    return run

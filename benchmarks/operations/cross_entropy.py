"""The head: its loss with gradients, and its argmax for a few tokens."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.operations.case import Case, Inputs, Run
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.cross_entropy import linear_argmax, linear_cross_entropy
from qwen3_next.ops.quant import block_scale_shape

VOCABULARY, HIDDEN, TOKENIZER_IDS = 151_936, 2_048, 151_669


def cases() -> Iterator[Case]:
    """The head of the small model in the package, then that of Qwen3-Next-80B-A3B."""
    for tokens, ids, width in ((98_304, 4_096, 256), (8_192, VOCABULARY, HIDDEN)):
        for run, products in ((linear_cross_entropy, 1), (_with_gradients, 4)):
            yield Case(
                operation="loss of the head" + (" with gradients" if products > 1 else ""),
                shape=f"T={tokens:,}, V={ids:,}, D={width:,}",
                make=lambda tokens=tokens, ids=ids, width=width: _inputs(tokens, ids, width),
                ours=run,
                definition=_definition(run),
                timed_definition=_definition(run),
                peers={"torch with all logits": _torch_with_gradients if products > 1 else _torch},
                read_bytes=2 * width * (tokens + ids),
                written_bytes=4 * tokens if products == 1 else 2 * width * (tokens + ids),
                # With gradients the logits are computed again: they are not kept.
                flops=2 * products * tokens * ids * width,
                tolerance=1e-2,
            )
    for fp8 in (False, True):
        for tokens in (1, 16, 64):
            size = VOCABULARY * HIDDEN * (1 if fp8 else 2)
            yield Case(
                operation="largest logit of the head" + (", fp8" if fp8 else ""),
                shape=f"{tokens} token{'s' if tokens > 1 else ''}",
                make=lambda tokens=tokens, fp8=fp8: _head(tokens, fp8),
                ours=linear_argmax,
                definition=_definition(linear_argmax),
                peers={} if fp8 else {"cuBLAS, argmax": _cublas},
                read_bytes=size + 2 * tokens * HIDDEN,
                written_bytes=8 * tokens,
                tolerance=0.0 if tokens == 1 else 0.02,
                quoted=("cuBLAS alone", 164.0) if tokens == 1 and not fp8 else None,
                goal=1.1 if tokens == 1 else None,
                graph=True,
            )


def _inputs(tokens: int, ids: int, width: int) -> Inputs:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    weight = 2 * torch.randn(ids, width, **options) / width**0.5
    return torch.randn(tokens, width, **options), weight, torch.randint(ids, (tokens,), device="cuda")


def _head(tokens: int, fp8: bool) -> Inputs:
    """Hidden states near a row of the head each, so that rounding cannot change which logit is the largest."""
    weight = torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    hidden += weight[torch.randint(TOKENIZER_IDS, (tokens,), device="cuda")]
    if not fp8:
        return hidden, weight, None, TOKENIZER_IDS
    scales = torch.rand(block_scale_shape((VOCABULARY, HIDDEN)), device="cuda") / 8 + 1
    return hidden, weight.to(torch.float8_e4m3fn), scales, TOKENIZER_IDS


def _with_gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the mean loss."""
    tensors = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    return torch.autograd.grad(linear_cross_entropy(*tensors, targets).mean(), tensors)


def _definition(run: Run) -> Run:
    def defined(*inputs: Any) -> Any:
        with use("reference"):
            return run(*inputs)

    return defined


def _torch(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), targets, reduction="none")


def _torch_with_gradients(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    tensors = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    return torch.autograd.grad(_torch(*tensors, targets).mean(), tensors)


def _cublas(hidden: Tensor, weight: Tensor, scales: None, limit: int) -> Tensor:
    return (hidden @ weight[:limit].t()).argmax(dim=1)

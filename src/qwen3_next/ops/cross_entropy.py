"""Cross-entropy of a linear head without ever holding the logits of all tokens."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import accelerated

IGNORED = -100
"""The target of a token that carries no loss."""

_CHUNK_BYTES = 256 * 2**20


@accelerated("cross_entropy_triton")
def linear_cross_entropy(
    hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "T"], ignore_index: int = IGNORED
) -> Float[Tensor, "T"]:
    """`-log softmax(weight hidden_t)[targets_t]` for each token, in fp32; 0 where the target is `ignore_index`.

    Tokens are taken in chunks whose fp32 logits fit 256 MiB; the backward pass computes them again, so memory grows
    with `T + V` and never with `T x V`. Differentiable in `hidden` and `weight`.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index)  # type: ignore[no-any-return]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        losses = [
            _chunk_loss(h, weight, t, ignore_index) for h, t in zip(*_chunks(weight, hidden, targets), strict=True)
        ]
        ctx.save_for_backward(hidden, weight, targets)
        ctx.ignore_index = ignore_index
        return torch.cat(losses) if losses else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        for h, t, g, out in zip(*_chunks(weight, hidden, targets, grads[0], hidden_grad), strict=True):
            logits_grad = _chunk_logits_grad(h, weight, t, g, ctx.ignore_index)
            out.copy_(logits_grad @ weight)
            weight_grad += logits_grad.t() @ h
        return hidden_grad, weight_grad.to(weight.dtype), None, None


def _chunks(weight: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    return [x.split(rows) for x in tensors]


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    logits = (hidden @ weight.t()).float()
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")


def _chunk_logits_grad(hidden: Tensor, weight: Tensor, targets: Tensor, grad: Tensor, ignore_index: int) -> Tensor:
    """d loss / d logits = (softmax - onehot) x incoming gradient, 0 where ignored."""
    probabilities = (hidden @ weight.t()).float().softmax(dim=-1)
    kept = targets != ignore_index
    column = targets.clamp_min(0)[:, None]
    probabilities.scatter_add_(1, column, torch.full_like(column, -1, dtype=probabilities.dtype))
    return (probabilities * (grad * kept)[:, None]).to(hidden.dtype)

"""Cross-entropy of a linear head without ever holding the logits of all tokens."""

from typing import Any

import torch
import torch.nn.functional as F
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
        scales = (grads[0] * (targets != ctx.ignore_index))[:, None]
        for h, t, scale, out in zip(*_chunks(weight, hidden, targets, scales, hidden_grad), strict=True):
            logits_grad = _chunk_logits_grad(h, weight, t)
            torch.mul(logits_grad @ weight, scale, out=out)
            weight_grad += logits_grad.t() @ (h * scale).to(h.dtype)
        return hidden_grad, weight_grad.to(weight.dtype), None, None


def _chunks(weight: Tensor, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    rows = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
    return [x.split(rows) for x in tensors]


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    log_probabilities = (hidden @ weight.t()).log_softmax(dim=-1, dtype=torch.float32)
    return F.nll_loss(log_probabilities, targets, ignore_index=ignore_index, reduction="none")


def _chunk_logits_grad(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """d loss / d logits = softmax - onehot; the incoming gradient scales rows, which waits for the narrow products."""
    gradient = (hidden @ weight.t()).softmax(dim=-1, dtype=torch.float32)
    column = targets.clamp_min(0)[:, None]
    gradient.scatter_add_(1, column, torch.full_like(column, -1, dtype=torch.float32))
    return gradient.to(hidden.dtype)

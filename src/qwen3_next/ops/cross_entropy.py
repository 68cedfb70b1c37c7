"""Cross-entropy and argmax of a linear head without ever holding the logits of all tokens."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.quant import FP8_BLOCK, dequantize_block_fp8

IGNORED = -100
"""The target of a token that carries no loss."""

_CHUNK_BYTES = 256 * 2**20

_ARGMAX_BYTES = 4 * 2**20
"""Of the fp32 weights and logits of a block of the vocabulary: little enough to stay in a cache."""


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


@accelerated("linear_argmax_triton")
@torch.no_grad()
def linear_argmax(
    hidden: Float[Tensor, "T D"],
    weight: Shaped[Tensor, "V D"],
    scale_inv: Float[Tensor, "VB DB"] | None = None,
    limit: int | None = None,
) -> Int[Tensor, "T"]:
    """The id with the largest logit of each token, `argmax_v weight_v hidden_t`, the smallest id where several are.

    Products of the inputs as they are, summed in fp32. Has no gradient.

    Args:
        weight: in the dtype of `hidden`, or e4m3 with the scales of its blocks (`dequantize_block_fp8`).
        limit: ids from here on are never chosen (rows that only fill up the vocabulary); None allows all.

    Raises:
        InputError: `limit` allows no id; weight and scales do not belong together.
    """
    vocabulary = allowed_ids(weight, limit)
    rows = max(1, _ARGMAX_BYTES // (4 * (hidden.shape[0] + hidden.shape[1]) * FP8_BLOCK)) * FP8_BLOCK
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    best = torch.full(hidden.shape[:1], float("-inf"), dtype=dtype, device=hidden.device)
    ids = torch.zeros_like(best, dtype=torch.int64)
    for first in range(0, vocabulary, rows):
        block = _block_of_weight(weight, scale_inv, first, min(rows, vocabulary - first), dtype)
        top = (hidden.to(dtype) @ block.t()).max(dim=1)
        larger = top.values > best
        best, ids = torch.where(larger, top.values, best), torch.where(larger, top.indices + first, ids)
    return ids


def allowed_ids(weight: Shaped[Tensor, "V D"], limit: int | None) -> int:
    """How many ids `linear_argmax` may choose from.

    Raises:
        InputError: none.
    """
    vocabulary = weight.shape[0] if limit is None else min(limit, weight.shape[0])
    if vocabulary < 1:
        raise InputError(f"limit={limit} leaves no id of a vocabulary of {weight.shape[0]}; it must be at least 1.")
    return vocabulary


def _block_of_weight(weight: Tensor, scale_inv: Tensor | None, first: int, rows: int, dtype: torch.dtype) -> Tensor:
    """`first` is a multiple of the rows of a scale."""
    block = weight[first : first + rows]
    if scale_inv is None:
        return block.to(dtype)
    scales = scale_inv[first // FP8_BLOCK : -(-(first + rows) // FP8_BLOCK)]
    return dequantize_block_fp8(block, scales, dtype)

"""The mixture of small experts: routing, grouped SwiGLU, weighted sum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

_GATHER_LIMIT = 32
"""Up to this many (token, expert) pairs on a GPU, reading each pair's expert alone beats the grouped kernels."""

_FEW_PAIRS = 256
"""Up to this many pairs one concatenation costs less than an addition per expert."""

_ALIGNMENT = 8
"""The grouped kernel wants rows of whole 16 bytes."""


@dataclass(frozen=True, eq=False)
class Routing:
    """Where each token goes.

    Attributes:
        logits: `[T, E]` scores of the router, in the model's dtype.
        probabilities: `[T, E]` their softmax over all experts, fp32.
        weights: `[T, K]` share of each chosen expert in the output, in the dtype of the logits.
        experts: `[T, K]` indices of the chosen experts.
    """

    logits: Float[Tensor, "T E"]
    probabilities: Float[Tensor, "T E"]
    weights: Float[Tensor, "T K"]
    experts: Int[Tensor, "T K"]


def route(
    x: Float[Tensor, "T D"],
    gate_weight: Float[Tensor, "E D"],
    top_k: int,
    normalize: bool,
    experts: Int[Tensor, "T K"] | None = None,
) -> Routing:
    """Choose `top_k` experts per token by the softmax of a linear score over all of them.

    Args:
        normalize: divide the chosen probabilities by their sum.
        experts: a choice made before, to be repeated; only its weights are computed anew. A recomputed forward pass
            hands it in, so that rounding cannot send a token elsewhere than in the first pass.

    (Shazeer et al. 2017, arXiv:1701.06538, eq. 3-5, with softmax before the choice as Qwen's models have it.)
    """
    logits = F.linear(x, gate_weight)
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    if experts is None and not torch.is_grad_enabled():
        weights, experts = probabilities.topk(top_k, dim=-1)
    else:
        # Gathered in either case: a recomputation has to save the very tensors that the first pass saved.
        experts = probabilities.detach().topk(top_k, dim=-1).indices if experts is None else experts
        weights = probabilities.gather(-1, experts)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(logits, probabilities, weights.to(logits.dtype), experts)


def swiglu_experts(
    x: Float[Tensor, "T D"],
    gate_up_proj: Float[Tensor, "E 2F D"],
    down_proj: Float[Tensor, "E D F"],
    weights: Float[Tensor, "T K"],
    experts: Int[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """`sum_k weights_k down_k(silu(gate_k x) * up_k x)` over the K chosen experts of each token.

    Rows 0..F-1 of an expert's `gate_up_proj` are its gate, rows F..2F-1 its up projection. (Shazeer 2020,
    arXiv:2002.05202, eq. 6 for SwiGLU.) Tokens are sorted by expert so that each expert is one matrix product; a
    handful of tokens on a GPU reads each chosen expert directly instead.
    """
    if experts.numel() == 0:
        return x * 0
    if x.is_cuda and experts.numel() <= _GATHER_LIMIT and not torch.is_grad_enabled():
        return _gathered(x, gate_up_proj, down_proj, weights, experts)
    by_expert, order = experts.flatten().sort(stable=True)
    if _has_grouped_gemm(x, gate_up_proj):
        return _grouped(x, gate_up_proj, down_proj, weights, by_expert, order)
    hit, sizes = (found.tolist() for found in by_expert.unique_consecutive(return_counts=True))
    loop = _looped if torch.is_grad_enabled() or order.numel() <= _FEW_PAIRS else _looped_in_place
    return loop(x, gate_up_proj, down_proj, weights, order, hit, sizes)


def expert_counts(experts: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, "E"]:
    """How many tokens chose each expert; unlike `bincount`, without a wait for the device."""
    chosen = experts.flatten()
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, chosen, torch.ones_like(chosen))


def _permuted(
    x: Float[Tensor, "R D"], source: Int[Tensor, "P"], inverse: Int[Tensor, "P"], copies: int
) -> Float[Tensor, "P D"]:
    """`x[source]`, where every row is taken `copies` times and `inverse` tells where its copies went."""
    return _Permutation.apply(x, source, inverse, copies)  # type: ignore[no-any-return]


class _Permutation(torch.autograd.Function):
    """A gather whose gradient is a gather as well: faster than scattered additions, and the same on every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[source]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0][inverse]
        return grad.unflatten(0, (-1, ctx.copies)).sum(dim=1) if ctx.copies > 1 else grad, None, None, None


def _gathered(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Every (token, expert) pair reads its expert: no sorting, no grouping."""
    pairs = experts.flatten()
    repeated = x[:, None].expand(-1, experts.shape[1], -1).flatten(0, 1)[..., None]
    gate, up = torch.bmm(gate_up_proj[pairs], repeated).chunk(2, dim=1)
    outputs = torch.bmm(down_proj[pairs], F.silu(gate) * up)
    return torch.bmm(weights[:, None], outputs.view(*experts.shape, -1))[:, 0]


def _has_grouped_gemm(x: Tensor, gate_up_proj: Tensor) -> bool:
    """torch's kernel is for bf16 on Hopper and later; elsewhere it is a slow loop, or missing."""
    aligned = all(size % _ALIGNMENT == 0 for size in (gate_up_proj.shape[1] // 2, gate_up_proj.shape[2]))
    on_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return on_hopper and aligned and x.dtype is torch.bfloat16


def _grouped(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weights: Tensor, by_expert: Tensor, order: Tensor
) -> Tensor:
    """Each projection of all experts is one GPU kernel over the rows sorted by expert."""
    numbers = torch.arange(gate_up_proj.shape[0], device=x.device)
    borders = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
    inverse = _inverse(order)
    rows = _permuted(x, order // weights.shape[1], inverse, weights.shape[1])
    gate, up = F.grouped_mm(rows, gate_up_proj.mT, offs=borders).chunk(2, dim=-1)
    outputs = F.grouped_mm(F.silu(gate) * up, down_proj.mT, offs=borders)
    return _combined(_permuted(outputs, inverse, order, 1), weights)


def _looped(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    order: Tensor,
    hit: Sequence[int],
    sizes: list[int],
) -> Tensor:
    """One expert that was hit after the other."""
    inverse = _inverse(order)
    rows = _permuted(x, order // weights.shape[1], inverse, weights.shape[1]).split(sizes)
    first, second = gate_up_proj, down_proj
    if torch.is_grad_enabled():
        # Indexing one expert costs a full-size gradient each; unbind costs one for all of them together.
        first, second = first.unbind(0), second.unbind(0)
    outputs = torch.cat([_swiglu(part, first[e], second[e]) for part, e in zip(rows, hit, strict=True)])
    return _combined(_permuted(outputs, inverse, order, 1), weights)


def _looped_in_place(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    order: Tensor,
    hit: Sequence[int],
    sizes: list[int],
) -> Tensor:
    """The same without gradients: each expert's rows stay in a CPU's cache from the gather to the sum in fp32."""
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    tokens, shares = order // weights.shape[1], weights.flatten()[order, None].to(total.dtype)
    for e, of_expert, share in zip(hit, tokens.split(sizes), shares.split(sizes), strict=True):
        total.index_add_(0, of_expert, _swiglu(x[of_expert], gate_up_proj[e], down_proj[e]) * share)
    return total.to(x.dtype)


def _swiglu(x: Float[Tensor, "P D"], gate_up: Float[Tensor, "2F D"], down: Float[Tensor, "D F"]) -> Tensor:
    gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.t()


def _combined(outputs: Float[Tensor, "T_times_K D"], weights: Float[Tensor, "T K"]) -> Float[Tensor, "T D"]:
    return (outputs.unflatten(0, weights.shape) * weights[..., None]).sum(dim=1)


def _inverse(order: Int[Tensor, "P"]) -> Int[Tensor, "P"]:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))

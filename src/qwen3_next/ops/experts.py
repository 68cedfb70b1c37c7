"""The mixture of small experts: routing, grouped SwiGLU, weighted sum."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import accelerated

_GATHER_LIMIT = 32
"""Up to this many (token, expert) pairs on a GPU, reading each pair's expert alone beats the grouped kernels."""

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


@accelerated("experts_triton")
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


@accelerated("experts_triton")
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
    top_k = experts.shape[1]
    by_expert, order = experts.flatten().sort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    product = _grouped_product(x, gate_up_proj, by_expert)
    gate, up = product(_permuted(x, order // top_k, inverse, top_k), gate_up_proj).chunk(2, dim=-1)
    outputs = _permuted(product(F.silu(gate) * up, down_proj), inverse, order, 1)
    return (outputs.view(*experts.shape, -1) * weights[..., None]).sum(dim=1)


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
    pairs = experts.flatten()
    repeated = x[:, None].expand(-1, experts.shape[1], -1).flatten(0, 1)[..., None]
    gate, up = torch.bmm(gate_up_proj[pairs], repeated).chunk(2, dim=1)
    outputs = torch.bmm(down_proj[pairs], F.silu(gate) * up)
    return torch.bmm(weights[:, None], outputs.view(*experts.shape, -1))[:, 0]


class _GroupedGemm:
    """Rows grouped by expert times the experts' matrices, in one GPU kernel (bf16)."""

    def __init__(self, by_expert: Int[Tensor, "P"], num_experts: int) -> None:
        numbers = torch.arange(num_experts, device=by_expert.device)
        self.borders = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)

    def __call__(self, x: Float[Tensor, "P I"], weight: Float[Tensor, "E O I"]) -> Float[Tensor, "P O"]:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=self.borders)


class _ExpertLoop:
    """The same product, one matrix multiplication for each expert that was hit."""

    def __init__(self, by_expert: Int[Tensor, "P"]) -> None:
        hit, sizes = by_expert.unique_consecutive(return_counts=True)
        self.hit: list[int] = hit.tolist()
        self.sizes: list[int] = sizes.tolist()

    def __call__(self, x: Float[Tensor, "P I"], weight: Float[Tensor, "E O I"]) -> Float[Tensor, "P O"]:
        # Indexing one expert costs a full-size gradient each; unbind costs one for all of them together.
        matrices = weight.unbind(0) if weight.requires_grad else weight
        return torch.cat([rows @ matrices[e].t() for rows, e in zip(x.split(self.sizes), self.hit, strict=True)])


def _grouped_product(x: Tensor, weight: Tensor, by_expert: Tensor) -> _GroupedGemm | _ExpertLoop:
    """`by_expert` is the expert of each row, in rising order."""
    aligned = all(size % _ALIGNMENT == 0 for size in (weight.shape[1] // 2, weight.shape[2]))
    on_hopper = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    if on_hopper and aligned and x.dtype is torch.bfloat16:
        return _GroupedGemm(by_expert, weight.shape[0])
    return _ExpertLoop(by_expert)

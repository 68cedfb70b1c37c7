"""Routing on the GPU: softmax, the best of it and their weights in one pass over the logits."""
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.linear import linear
from qwen3_next.ops.routing import Routing

_MOST_EXPERTS = 4_096
"""Logits of a token that one program can hold."""

WARPS, BACKWARD_WARPS = 1, 4
"""Of the program of a token: the maxima of one warp never leave the registers. For H100 and H200."""


def _refusal(x: Tensor, gate_weight: Tensor, top_k: int, normalize: bool, experts: Tensor | None = None) -> str | None:
    if x.dtype == torch.float64 or gate_weight.dtype != x.dtype:
        return f"logits of one dtype up to fp32, not of {x.dtype} and {gate_weight.dtype}"
    return None if len(gate_weight) <= _MOST_EXPERTS else f"up to {_MOST_EXPERTS} experts, not {len(gate_weight)}"


@refuses(_refusal)
def route(
    x: Float[Tensor, "T D"],
    gate_weight: Float[Tensor, "E D"],
    top_k: int,
    normalize: bool,
    experts: Int[Tensor, "T K"] | None = None,
) -> Routing:
    """The twin of `ops.routing.route`."""
    logits = linear(x, gate_weight)
    if torch.is_grad_enabled() and logits.requires_grad:
        return Routing(logits, *_Choice.apply(logits, top_k, normalize, experts))
    return Routing(logits, *_choose(logits, top_k, normalize, experts))


class _Choice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, top_k: int, normalize: bool, experts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        probabilities, weights, experts = _choose(logits, top_k, normalize, experts)
        ctx.save_for_backward(probabilities, experts)
        ctx.normalize, ctx.dtype = normalize, logits.dtype
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        return probabilities, weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        probabilities, experts = ctx.saved_tensors
        tokens, count = probabilities.shape
        d_logits = torch.empty(tokens, count, dtype=ctx.dtype, device=probabilities.device)
        d_probabilities, d_weights = (None if grad is None else grad.contiguous() for grad in grads[:2])
        if tokens:
            _backward_kernel[(tokens,)](
                probabilities, experts, d_probabilities, d_weights, d_logits, count,
                BLOCK=triton.next_power_of_2(count), NORMALIZE=ctx.normalize, **_choices(experts.shape[1]),
                num_warps=BACKWARD_WARPS,
            )  # fmt: skip
        return d_logits, None, None, None


def _choose(logits: Tensor, top_k: int, normalize: bool, given: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    tokens, count = logits.shape
    top_k = top_k if given is None else given.shape[1]
    probabilities = torch.empty(tokens, count, dtype=torch.float32, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=logits.dtype, device=logits.device)
    experts = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device) if given is None else given
    if tokens:
        _choose_kernel[(tokens,)](
            logits, None if given is None else given.contiguous(), probabilities, weights, experts, count,
            BLOCK=triton.next_power_of_2(count), NORMALIZE=normalize, **_choices(top_k), num_warps=WARPS,
        )  # fmt: skip
    return probabilities, weights, experts


def _choices(top_k: int) -> dict[str, int]:
    return {"K": top_k, "BK": triton.next_power_of_2(top_k)}


@triton.jit
def _choose_kernel(
    p_logits, p_given, p_probabilities, p_weights, p_experts, count,
    BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One token. Of equal probabilities the expert with the smaller number is the better one."""
    i_token = tl.program_id(0).to(tl.int64)
    o_expert, o_choice = tl.arange(0, BLOCK), tl.arange(0, BK)
    b_logits = tl.load(p_logits + i_token * count + o_expert, o_expert < count, other=float("-inf")).to(tl.float32)
    b_exp = tl.exp(b_logits - tl.max(b_logits, axis=0))
    b_probability = b_exp / tl.sum(b_exp, axis=0)
    tl.store(p_probabilities + i_token * count + o_expert, b_probability, o_expert < count)
    b_chosen, b_best = tl.zeros([BK], tl.int32), tl.zeros([BK], tl.float32)
    if p_given is not None:
        b_given = tl.load(p_given + i_token * K + o_choice, o_choice < K, other=0)
        b_best += tl.load(p_logits + i_token * count + b_given, o_choice < K, other=float("-inf")).to(tl.float32)
        b_best = tl.exp(b_best - tl.max(b_logits, axis=0)) / tl.sum(b_exp, axis=0)
    else:
        b_left = tl.where(o_expert < count, b_probability, -1.0)
        for i in tl.static_range(K):
            b_value, b_index = tl.max(b_left, axis=0, return_indices=True, return_indices_tie_break_left=True)
            b_chosen = tl.where(o_choice == i, b_index, b_chosen)
            b_best = tl.where(o_choice == i, b_value, b_best)
            b_left = tl.where(o_expert == b_index, -1.0, b_left)
        tl.store(p_experts + i_token * K + o_choice, b_chosen.to(tl.int64), o_choice < K)
    if NORMALIZE:
        b_best = b_best / tl.sum(b_best, axis=0)
    tl.store(p_weights + i_token * K + o_choice, b_best.to(p_weights.dtype.element_ty), o_choice < K)


@triton.jit
def _backward_kernel(
    p_probabilities, p_experts, p_d_probabilities, p_d_weights, p_d_logits, count,
    BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Of one token: through the division by the sum of the chosen, then through the softmax."""
    i_token = tl.program_id(0).to(tl.int64)
    o_expert, o_choice = tl.arange(0, BLOCK), tl.arange(0, BK)
    b_probability = tl.load(p_probabilities + i_token * count + o_expert, o_expert < count, other=0.0)
    b_gradient = tl.zeros([BLOCK], tl.float32)
    if p_d_probabilities is not None:
        b_gradient += tl.load(p_d_probabilities + i_token * count + o_expert, o_expert < count, other=0.0)
    if p_d_weights is not None:
        b_given = tl.load(p_experts + i_token * K + o_choice, o_choice < K, other=-1)
        b_best = tl.load(p_probabilities + i_token * count + b_given, o_choice < K, other=0.0)
        b_d_weight = tl.load(p_d_weights + i_token * K + o_choice, o_choice < K, other=0.0).to(tl.float32)
        if NORMALIZE:
            total = tl.sum(b_best, axis=0)
            b_d_weight = (b_d_weight - tl.sum(b_d_weight * b_best, axis=0) / total) / total
        b_hit = b_given[None, :] == o_expert[:, None]
        b_gradient += tl.sum(tl.where(b_hit, b_d_weight[None, :], 0.0), axis=1)
    b_gradient = b_probability * (b_gradient - tl.sum(b_gradient * b_probability, axis=0))
    tl.store(p_d_logits + i_token * count + o_expert, b_gradient.to(p_d_logits.dtype.element_ty), o_expert < count)

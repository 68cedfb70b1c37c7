"""Routing: which experts each token goes to, and with what weight."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import accelerated


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


@accelerated("routing_triton")
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


def expert_counts(experts: Int[Tensor, "T K"], num_experts: int) -> Int[Tensor, "E"]:
    """How many tokens chose each expert; unlike `bincount`, without a wait for the device."""
    chosen = experts.flatten()
    counts = torch.zeros(num_experts, dtype=torch.int64, device=chosen.device)
    return counts.scatter_add_(0, chosen, torch.ones_like(chosen))

"""The load-balancing loss of a mixture of experts, from counts that can be summed over batches and ranks."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.routing import Routing, expert_counts


def load_balancing_loss(
    counts: Int[Tensor, "E"], count_tokens: int | Tensor, probability_sums: Float[Tensor, "E"], tokens: int | Tensor
) -> Float[Tensor, ""]:
    """`E sum_e f_e p_e`: K when the load is even, E when every token chooses the same K experts with certainty.

    Args:
        counts: how many tokens chose each expert; carries no gradient.
        count_tokens: how many tokens were counted: f_e = counts_e / count_tokens.
        probability_sums: the router's probabilities summed over tokens; carries the gradient.
        tokens: what that sum is divided by: p_e = probability_sums_e / tokens.

    The counts may come from more tokens than the probabilities: from all ranks and the whole accumulation window, so
    that balance is asked of the global batch and not of every sequence. (Qiu et al. 2025, arXiv:2501.11873, eq. 3-5.)
    """
    frequencies = counts.to(probability_sums.dtype) / count_tokens
    return counts.numel() * (frequencies * (probability_sums / tokens)).sum()


def load_balancing_loss_of(routings: Sequence[Routing]) -> Float[Tensor, ""] | None:
    """The mean over layers for one batch on its own; None without a sparse layer."""
    losses = [
        load_balancing_loss(
            expert_counts(routing.experts, routing.probabilities.shape[1]),
            max(1, routing.experts.shape[0]),
            routing.probabilities.sum(0),
            max(1, routing.experts.shape[0]),
        )
        for routing in routings
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean() if losses else None

"""The training loss of an accumulation window: next token, multi-token prediction, load balance."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.model import PackedLosses, Qwen3NextForCausalLM
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.ops.load_balance import load_balancing_loss
from qwen3_next.ops.routing import Routing, expert_counts


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each part counts beside the next-token loss."""

    mtp: float
    balance: float


@dataclass(frozen=True, kw_only=True)
class Window:
    """What an optimiser step will see in all, known before its first batch.

    Attributes:
        targets: tokens with a target over all batches and ranks: the next token first, then each MTP step.
        tokens: tokens over all batches and ranks.
    """

    targets: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, eq=False)
class BatchLoss:
    """One batch's share of the window's loss; the shares of all batches and ranks sum to it.

    Attributes:
        total: what is differentiated.
        lm, mtp, balance: its parts before weighting, without gradient.
        load: `[layers, E]` tokens that chose each expert in this batch, over all ranks.
    """

    total: Float[Tensor, ""]
    lm: Float[Tensor, ""]
    mtp: Float[Tensor, ""]
    balance: Float[Tensor, ""]
    load: Int[Tensor, "L E"] | None


class LoadBuffer:
    """The experts' load counted over an accumulation window (the published global-batch form).

    Batch i is balanced against the load of batches 1..i of all ranks, unless `preset` holds the load of the whole
    window, counted before.
    """

    def __init__(self) -> None:
        self.counts: Int[Tensor, "L E"] | None = None
        self.preset = False

    def add(self, load: Int[Tensor, "L E"]) -> None:
        """Count one more batch."""
        self.counts = load if self.counts is None else self.counts + load


def batch_loss(
    model: Qwen3NextForCausalLM,
    inputs: PackedInputs,
    targets: Int[Tensor, "T"],
    window: Window,
    buffer: LoadBuffer,
    weights: LossWeights,
) -> BatchLoss:
    """The share of one batch in the loss of its window.

    Sums are divided by the counts of the whole window, so that how the window is cut into batches, documents and ranks
    changes nothing but rounding; gradients are to be summed over batches and ranks.
    """
    losses = model.packed_losses(inputs, targets)
    lm = losses.lm.sum() / max(1, window.targets[0])
    mtp = _mtp_mean(losses, window)
    balance, load = _balance(losses, window, buffer)
    total = lm + weights.mtp * mtp + weights.balance * balance
    return BatchLoss(total, lm.detach(), mtp.detach(), balance.detach(), load)


def count_load(
    model: Qwen3NextForCausalLM, inputs: PackedInputs, targets: Int[Tensor, "T"], buffer: LoadBuffer
) -> None:
    """Add a batch's load to the buffer without computing gradients."""
    with torch.no_grad():
        losses = model.packed_losses(inputs, targets)
    load = layer_load(losses.routings)
    if load is not None:
        buffer.add(load)


def layer_load(routings: Sequence[Routing]) -> Int[Tensor, "L E"] | None:
    """Tokens that chose each expert of each sparse layer, over all ranks; None without sparse layers."""
    if not routings:
        return None
    load = torch.stack([expert_counts(r.experts, r.probabilities.shape[1]) for r in routings])
    if _ranks() > 1:
        dist.all_reduce(load)
    return load


def _mtp_mean(losses: PackedLosses, window: Window) -> Tensor:
    """The mean over the chained steps of each step's mean over its targets."""
    shares = [loss.sum() / max(1, count) for loss, count in zip(losses.mtp, window.targets[1:], strict=True)]
    return torch.stack(shares).mean() if shares else losses.lm.new_zeros(())


def _balance(losses: PackedLosses, window: Window, buffer: LoadBuffer) -> tuple[Tensor, Int[Tensor, "L E"] | None]:
    load = layer_load(losses.routings)
    if load is None:
        return losses.lm.new_zeros(()), None
    if not buffer.preset:
        buffer.add(load)
    assert buffer.counts is not None
    terms = [
        # Each token counted for as many experts as it chose, so the sum tells how many tokens there were on all ranks.
        load_balancing_loss(
            counts, counts.sum() / routing.experts.shape[1], routing.probabilities.sum(0), window.tokens
        )
        for counts, routing in zip(buffer.counts, losses.routings, strict=True)
    ]
    return torch.stack(terms).mean(), load


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

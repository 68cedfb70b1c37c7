"""Losses on documents that were not trained on."""

import torch

from qwen3_next.model import Qwen3NextForCausalLM
from qwen3_next.train.data import PackedDocuments
from qwen3_next.train.ranks import Ranks


@torch.no_grad()
def validate(model: Qwen3NextForCausalLM, documents: PackedDocuments, ranks: Ranks) -> dict[str, float]:
    """Nats per token of the next token and of each MTP step, and nats per byte where the bytes are known.

    To be called on every rank; they share the batches.
    """
    was_training = model.training
    model.eval()
    steps = model.config.num_mtp_steps if model.mtp is not None else 0
    sums = [torch.zeros((), dtype=torch.float64, device=ranks.device) for _ in range(1 + steps)]
    counts = [0] * (1 + steps)
    for round_, batch, is_counted in ranks.shares(documents.once()):
        losses = model.packed_losses(*batch.to(ranks.device))
        if is_counted:
            sums = [total + part.double().sum() for total, part in zip(sums, (losses.lm, *losses.mtp), strict=True)]
        counts = [sum(parts) for parts in zip(counts, *(one.target_counts(steps) for one in round_), strict=True)]
    sums = ranks.sum_(torch.stack(sums)).tolist()
    model.train(was_training)
    names = ("lm", *(f"mtp_{step}" for step in range(1, steps + 1)))
    results = {n: s / max(1, c) for n, s, c in zip(names, sums, counts, strict=True)}
    size = sum(store.bytes for store in documents.stores)
    return results | ({"lm_per_byte": sums[0] / size} if size else {})

"""Losses on documents that were not trained on."""

import torch

from qwen3_next.model import Qwen3NextForCausalLM
from qwen3_next.train.data import PackedDocuments


@torch.no_grad()
def validate(model: Qwen3NextForCausalLM, documents: PackedDocuments, device: torch.device) -> dict[str, float]:
    """Nats per token of the next token and of each MTP step, and nats per byte where the bytes are known."""
    was_training = model.training
    model.eval()
    steps = model.config.num_mtp_steps if model.mtp is not None else 0
    sums = [torch.zeros((), dtype=torch.float64, device=device) for _ in range(1 + steps)]
    counts = [0] * (1 + steps)
    for batch in documents.once():
        inputs, targets = batch.to(device)
        losses = model.packed_losses(inputs, targets)
        sums = [total + part.double().sum() for total, part in zip(sums, (losses.lm, *losses.mtp), strict=True)]
        counts = [total + part for total, part in zip(counts, batch.target_counts(steps), strict=True)]
    model.train(was_training)
    names = ("lm", *(f"mtp_{step}" for step in range(1, steps + 1)))
    results = {n: s.item() / max(1, c) for n, s, c in zip(names, sums, counts, strict=True)}
    size = sum(store.bytes for store in documents.stores)
    return results | ({"lm_per_byte": sums[0].item() / size} if size else {})

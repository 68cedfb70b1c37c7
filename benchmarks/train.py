"""A training step of the shipped model's configuration on the kernels beside the same step on the definitions.

    python -m benchmarks.train [--device cuda] [--steps N] [--tokens T]

Three short runs from the same weights and over the same documents: kernels, definitions, and definitions with the
documents of each batch in the opposite order, which changes nothing but rounding. What that does to the loss curve is
the noise; nothing is timed where the kernels' curve is further from the definitions' than a few times that. Times are
medians of whole optimiser steps, forward, backward and update, after three that warm up.
"""

import argparse
import statistics
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from qwen3_next.ops import use
from qwen3_next.ops.backend import Backend
from qwen3_next.ops.cross_entropy import IGNORED
from qwen3_next.train.config import OptimizerSettings
from qwen3_next.train.data import Cursor, PackedBatch
from qwen3_next.train.loss import LoadBuffer, LossWeights, Window, batch_loss
from qwen3_next.train.optimizer import MasterAdamW

RECIPE = Path(__file__).parent.parent / "recipes" / "shipped_model" / "train.toml"
WARM = 3
NOISE = 4.0
"""How many times the noise of the definitions the curves may be apart."""

RED, UNUSABLE = 1, 2


@dataclass(frozen=True)
class Run:
    """The loss of every step, and the seconds of those after the warm-up."""

    losses: list[float]
    seconds: list[float]

    def distance(self, other: "Run") -> float:
        """The largest difference of two curves; NaN becomes infinity."""
        apart = max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))
        return apart if apart == apart else float("inf")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, 1 where the curves are apart, or 2 without the device."""
    options = parse(arguments)
    out = Console(highlight=False, markup=False, width=120)
    if options.device == "cuda" and not torch.cuda.is_available():
        Console(stderr=True).print("benchmarks/train.py: there is no CUDA device; see --device.")
        return UNUSABLE
    device = torch.device(options.device)
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    batches = [random_documents(recipe, options.tokens, seed) for seed in range(options.steps)]
    kernels = trained(recipe, batches, device, "auto")
    plain = trained(recipe, batches, device, "reference")
    turned = trained(recipe, [reverse(batch) for batch in batches], device, "reference")
    noise, apart = plain.distance(turned), kernels.distance(plain)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    out.print(f"{name}, torch {torch.__version__}, {options.tokens:,} tokens a step, {options.steps} steps")
    out.print(
        f"loss {plain.losses[0]:.3f} to {plain.losses[-1]:.3f}; kernels at most {apart:.1e} from the definitions, "
        f"these at most {noise:.1e} from themselves in another order"
    )
    if apart > NOISE * noise:
        out.print(f"RED: more than {NOISE:g} times the noise.")
        return RED
    ours, theirs = (statistics.median(run.seconds) for run in (kernels, plain))
    for label, seconds in (("kernels", ours), ("definitions", theirs)):
        out.print(f"{label:12} {seconds * 1e3:9.1f} ms a step {options.tokens / seconds:12,.0f} tokens/s")
    out.print(f"kernels are {theirs / ours:.2f} times as fast")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=98_304)
    return parser.parse_args(arguments)


def random_documents(recipe: dict[str, Any], tokens: int, seed: int) -> PackedBatch:
    """Documents of many lengths in which every token follows from the one before, but for a tenth."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary, longest = recipe["model"]["config"]["vocab_size"], recipe["data"]["sequence_length"]
    lengths: list[int] = []
    while (room := tokens - sum(lengths)) > 0:
        lengths.append(min(room, int(torch.randint(1, longest + 1, (1,), generator=generator))))
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    follows = torch.rand(tokens, generator=generator) < 0.9
    for i in range(1, 4):  # in runs of a few tokens
        ids[i:] = torch.where(follows[i:], (ids[:-i] * 5 + i) % vocabulary, ids[i:])
    return packed(list(ids.split(lengths)))


def packed(documents: Sequence[torch.Tensor]) -> PackedBatch:
    """Documents one after the other, each with its own next tokens as targets."""
    targets = [torch.cat([one[1:], one.new_full((1,), IGNORED)]) for one in documents]
    return PackedBatch(torch.cat(list(documents)), torch.cat(targets), tuple(map(len, documents)), Cursor())


def reverse(batch: PackedBatch) -> PackedBatch:
    """The same documents, the last one first."""
    return packed(batch.token_ids.split(list(batch.lengths))[::-1])


def trained(recipe: dict[str, Any], batches: Sequence[PackedBatch], device: torch.device, backend: Backend) -> Run:
    """A run from fresh weights, always the same ones."""
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**recipe["model"]["config"])).float().train()
    cast("nn.Module", model).to(device)
    optimizer = MasterAdamW(model, OptimizerSettings(**recipe["optimizer"]), torch.bfloat16)
    weights = LossWeights(mtp=recipe["loss"]["mtp_weight"], balance=model.config.router_aux_loss_coef)
    losses, seconds = list[float](), list[float]()
    with use(backend):
        for step, batch in enumerate(track(batches, backend, transient=True)):
            started = time.perf_counter()
            inputs, targets = batch.to(device)
            window = Window(targets=batch.target_counts(model.config.num_mtp_steps), tokens=len(batch.token_ids))
            loss = batch_loss(model, inputs, targets, window, LoadBuffer(), weights)
            loss.total.backward()
            optimizer.accumulate()
            optimizer.step(recipe["optimizer"]["lr"] * min(1.0, (step + 1) / len(batches)))
            losses.append(loss.total.detach().item())  # waits for the device
            if step >= WARM:
                seconds.append(time.perf_counter() - started)
    return Run(losses, seconds)


if __name__ == "__main__":
    sys.exit(main())

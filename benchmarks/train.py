"""A training step of the shipped model's configuration on the kernels beside the same step on the definitions.

    python -m benchmarks.train [--device cuda] [--steps N] [--tokens T]
    torchrun --nproc-per-node 2 -m benchmarks.train --parallel [--experts G] ...

Three short runs from the same weights and over the same documents: kernels, definitions, and definitions with the
documents of each batch in the opposite order, which changes nothing but rounding. What that does to the loss curve is
the noise; nothing is timed where the kernels' curve is further from the definitions' than a few times that. Times are
medians of whole optimiser steps, forward, backward and update, after three that warm up.

With `--parallel`, all processes together beside one of them: windows of one batch for each rank, which the one takes
one after the other. The noise is that of one process with the batches' documents in the opposite order.
"""

import argparse
import os
import statistics
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from torch import nn

from qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from qwen3_next.ops import use
from qwen3_next.ops.backend import Backend
from qwen3_next.ops.cross_entropy import IGNORED
from qwen3_next.train.config import OptimizerSettings
from qwen3_next.train.data import Cursor, PackedBatch
from qwen3_next.train.loss import LoadBuffer, LossWeights, Window, batch_loss, count_load
from qwen3_next.train.optimizer import MasterAdamW
from qwen3_next.train.parallel import shard_
from qwen3_next.train.ranks import Ranks

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
    if options.parallel:
        return beside_one(options, out)
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
    parser.add_argument("--parallel", action="store_true", help="all processes of torchrun beside one")
    parser.add_argument("--experts", type=int, default=1, help="ranks that share one set of experts")
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


def beside_one(options: argparse.Namespace, out: Console) -> int:
    """Tokens per second of all processes and of one, where their losses are equal but for noise."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast is not available on every host
    rank, count, local = (int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if count < 2:
        Console(stderr=True).print("benchmarks/train.py: --parallel needs torchrun --nproc-per-node 2 or more.")
        return UNUSABLE
    device = torch.device("cuda", local) if options.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    recipe = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    windows = [
        [random_documents(recipe, options.tokens, step * count + place) for place in range(count)]
        for step in range(options.steps)
    ]
    alone = trained_windows(recipe, windows, Ranks(device))
    turned = trained_windows(recipe, [[reverse(batch) for batch in window] for window in windows], Ranks(device))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    together = trained_windows(recipe, windows, Ranks(device, rank, count, options.experts))
    dist.destroy_process_group()
    noise, apart = alone.distance(turned), together.distance(alone)
    if rank == 0:
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        out.print(
            f"{count} x {name}, torch {torch.__version__}, {options.tokens:,} tokens a rank, {options.steps} steps"
        )
        out.print(f"losses at most {apart:.1e} from those of one process, these at most {noise:.1e} from another order")
    if apart > NOISE * noise:
        out.print(f"RED: more than {NOISE:g} times the noise.")
        return RED
    if rank == 0:
        ours, theirs = (statistics.median(run.seconds) for run in (together, alone))
        for label, seconds in ((f"{count} processes", ours), ("one", theirs)):
            out.print(f"{label:12} {seconds * 1e3:9.1f} ms a step {count * options.tokens / seconds:12,.0f} tokens/s")
        out.print(f"{count} processes are {theirs / ours:.2f} times as fast as one")
    return 0


def trained_windows(recipe: dict[str, Any], windows: Sequence[Sequence[PackedBatch]], ranks: Ranks) -> Run:
    """A run from fresh weights, always the same ones, in which each rank computes its batches of every window."""
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**recipe["model"]["config"])).float().train()
    cuts = shard_(model, ranks, torch.bfloat16) if ranks.count > 1 else {}
    cast("nn.Module", model).to(ranks.device)
    optimizer = MasterAdamW(model, OptimizerSettings(**recipe["optimizer"]), torch.bfloat16, cuts, ranks)
    weights = LossWeights(mtp=recipe["loss"]["mtp_weight"], balance=model.config.router_aux_loss_coef)
    losses, seconds = list[float](), list[float]()
    for step, batches in enumerate(windows):
        started = time.perf_counter()
        counts = zip(*(batch.target_counts(model.config.num_mtp_steps) for batch in batches), strict=True)
        window = Window(targets=tuple(map(sum, counts)), tokens=sum(len(batch.token_ids) for batch in batches))
        buffer, total = LoadBuffer(), torch.zeros((), device=ranks.device)
        mine = batches[ranks.rank :: ranks.count]
        for batch in mine:
            count_load(model, *batch.to(ranks.device), buffer)
        buffer.preset = True
        for batch in mine:
            loss = batch_loss(model, *batch.to(ranks.device), window, buffer, weights)
            loss.total.backward()
            optimizer.accumulate()
            total += loss.total.detach()
        optimizer.step(recipe["optimizer"]["lr"] * min(1.0, (step + 1) / len(windows)))
        losses.append(ranks.sum_(total).item())  # waits for the device
        if step >= WARM:
            seconds.append(time.perf_counter() - started)
    return Run(losses, seconds)


if __name__ == "__main__":
    sys.exit(main())

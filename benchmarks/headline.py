"""The family's claim on one card: over ten times the throughput of the dense Qwen3-32B beyond 32k tokens.

    python -m benchmarks.headline [--served FILE] [--card-gb 141] [--json FILE] [--plot docs/headline.png]
    python -m benchmarks.headline --from FILE [--plot ...]

Two comparisons, which are not to be mixed. "bf16": ours at the shapes of 80B-A3B, 8 layers scaled to 48, beside
transformers' Qwen3 at the shapes of 32B, 16 layers scaled to 64, in one run; random weights, keys and values of both in
bf16, only the layers' time is scaled. Steps of both are CUDA graphs after contexts of random keys. "As many as fit" are
the streams that a card of --card-gb holds beside the whole model's fp8 weights (in bf16 the 80B fits no such card).
"fp8": the engine's rows of `python -m benchmarks.serve --device cuda --json FILE` beside vLLM's figures of another run,
with the floor that the card's own rates set to the dense model. Nothing is timed where a layer differs from its
definition.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks.claim.measure import DifferenceError, Setup, measured
from benchmarks.claim.rows import FULL, ONE, PREFILL, Row, row_of, served
from rich.console import Console
from rich.table import Table

CLAIM = 10
RED, UNUSABLE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, 1 where a layer differs from its definition, or 2 without a GPU."""
    options = parse(arguments)
    if options.rows is None and not torch.cuda.is_available():
        Console(stderr=True).print("benchmarks/headline.py: this needs a CUDA device, or the rows of a run (--from).")
        return UNUSABLE
    return run(options, Setup(card_bytes=options.card_gb * 1e9))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--from", dest="rows", type=Path, metavar="FILE", help="rows of an earlier run; needs no GPU")
    parser.add_argument("--served", type=Path, metavar="FILE", help="rows of benchmarks.serve, for the fp8 comparison")
    parser.add_argument("--card-gb", type=float, default=141.0, help="of the card whose streams are counted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every row there")
    parser.add_argument("--plot", type=Path, default=Path("docs/headline.png"), metavar="FILE")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, setup: Setup) -> int:
    """Measure, or read what was measured; print and draw it."""
    out = Console(highlight=False, markup=False, width=150)
    if options.rows is not None:
        record = json.loads(options.rows.read_text(encoding="utf-8"))
        machine, rows = record["machine"], [row_of(row) for row in record["rows"]]
    else:
        card = "CPU" if setup.device == "cpu" else torch.cuda.get_device_name()
        machine = f"{card}, torch {torch.__version__}, streams of a card of {setup.card_bytes / 1e9:.0f} GB"
        try:
            rows = list(measured(setup))
        except DifferenceError as error:
            out.print(f"{error}. No speed is printed.")
            return RED
    if options.served is not None:
        engine = json.loads(options.served.read_text(encoding="utf-8"))
        rows = [row for row in rows if not row.is_fp8] + list(served(engine))
    out.print(machine)
    for is_fp8, title in TITLES.items():
        if chosen := [row for row in rows if row.is_fp8 == is_fp8]:
            out.print(table(title, chosen))
    if options.json is not None:
        text = json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1)
        options.json.write_text(text, encoding="utf-8")
    draw(machine, rows, options.plot)
    return 0


TITLES = {
    False: "bf16, one run: ours 8 layers scaled to 48, transformers' Qwen3-32B 16 layers scaled to 64",
    True: "fp8: the engine, and vLLM with Qwen3-32B in ANOTHER RUN; the floor is the dense model's on this card",
}


def table(title: str, rows: Sequence[Row]) -> Table:
    """Tokens per second of all streams together."""
    found = Table(title=title)
    for name in (
        "work",
        "context",
        "streams",
        "ours",
        "with drafts",
        "dense, streams",
        "dense",
        "ratio",
        "dense floor",
    ):
        found.add_column(name, justify="left" if name == "work" else "right")
    for row in rows:
        ratio = None if row.ratio is None else f"{row.ratio:.1f} x"
        speeds = [None if one is None else f"{one:,.1f}" for one in (row.drafted, row.dense, row.floor)]
        cells = (row.work, f"{row.context:,}", f"{row.streams[0]:,}", f"{row.ours:,.1f}", speeds[0])
        found.add_row(*(one or "-" for one in (*cells, f"{row.streams[1]:,}", speeds[1], ratio, speeds[2])))
    return found


def draw(machine: str, rows: Sequence[Row], file: Path) -> None:
    """How many times as fast as the dense model, by context; a panel for each work."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    figure.suptitle(f"Qwen3-Next 80B-A3B beside dense Qwen3-32B ({machine})", fontsize=10)
    for axes, work in zip(figure.subplots(1, 3), (PREFILL, FULL, ONE), strict=True):
        for is_fp8, label in ((False, "bf16, beside transformers, one run"), (True, "fp8, beside vLLM of another run")):
            points = [(row.context, row.ratio) for row in rows if (row.work, row.is_fp8) == (work, is_fp8)]
            known = sorted((x, y) for x, y in points if y is not None)
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", linestyle="--" if is_fp8 else "-", label=label)
            for x, y in known:
                axes.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
        axes.axhline(CLAIM, color="grey", linewidth=0.8)
        axes.set(title=work, xlabel="context, tokens", ylabel="times the tokens per second of dense", ylim=(0, None))
        axes.set_xscale("log", base=2)
        contexts = sorted({row.context for row in rows if row.work == work})
        axes.set_xticks(contexts, [f"{one // 1024}k" if one >= 1024 else str(one) for one in contexts])
        if axes.lines[:-1]:
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(main())

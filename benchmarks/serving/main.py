"""The options of the benchmark on a GPU, its check, and its report."""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from benchmarks.operations.clock import card_rates
from benchmarks.operations.measure import Rates
from benchmarks.serving.rows import ROWS, Bench, Row, Sizes
from benchmarks.serving.setting import Setting, agreement, random_model
from benchmarks.serving.startup import startup
from rich.console import Console

from qwen3_next.errors import Qwen3NextError

NAMES = ("startup", *ROWS)
TOLERANCE = 0.35
"""Of `agreement`: a text in another context differs by 1.4."""

RED, UNUSABLE = 1, 2


def run(options: argparse.Namespace, settings: dict[str, Any], sizes: Sizes, rates: Rates | None = None) -> int:
    """Print the rows that were asked for; return 0, 1 where a batch changes a text or a row failed, 2 without a GPU.

    Args:
        settings: changes of the published shapes.
        rates: of the machine; None measures the card's.
    """
    out, begin = Console(highlight=False, markup=False, soft_wrap=True), time.perf_counter()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        Console(stderr=True).print("benchmarks/serve.py: --device cuda needs a CUDA device and there is none.")
        return UNUSABLE
    rates = card_rates() if rates is None else rates
    card = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    out.print(
        f"{card}, torch {torch.__version__}, {options.layers} layers, {options.quantization}; copy "
        f"{rates.copy / 1e12:.2f} TB/s, read {rates.read / 1e12:.2f} (floors of steps), bf16 {rates.bf16 / 1e12:.0f} "
        f"and fp8 {rates.fp8 / 1e12:.0f} TFLOP/s (floors of prompts)"
    )
    rows, skipped, failed = list[Row](), list[str](), list[str]()
    if "startup" in options.rows:  # first: its processes need the memory for themselves
        started = startup(settings, options.layers, options.device, options.quantization, options.dtype)
        rows += shown(started, out)
    loaded = random_model(settings, options.layers, options.device, options.quantization, options.dtype)
    bench = Bench(Setting(loaded), rates, sizes, options.quantization == "fp8")
    error = agreement(bench.setting)
    out.print(f"one text alone and in a batch: log-probabilities differ by {error:.4f}, {TOLERANCE} allowed")
    if not error <= TOLERANCE:
        return RED
    for name in (name for name in ROWS if name in options.rows):
        if time.perf_counter() - begin > 60 * options.minutes:
            skipped.append(name)
            continue
        try:
            rows += shown(ROWS[name](bench), out)
        except (Qwen3NextError, torch.OutOfMemoryError, RuntimeError) as failure:
            failed.append(name)  # what one row cannot do is said, and the card is used for the others
            out.print(f"{name}: FAILED with {type(failure).__name__}: {failure}")
    if skipped:
        out.print(f"Not measured, {options.minutes:g} minutes were over: {', '.join(skipped)}")
    if options.json is not None:
        record = {"card": card, "rates": asdict(rates), "rows": [row.record for row in rows]}
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return RED if failed else 0


def shown(rows: Iterator[Row], out: Console) -> list[Row]:
    """Print each as soon as it is there."""
    kept = list[Row]()
    for row in rows:
        kept.append(row)
        out.print(str(row))
    return kept

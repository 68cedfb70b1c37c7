"""How far this package's results are from transformers' Qwen3-Next: `python -m benchmarks.parity`.

Random weights and fresh tokens for every configuration of tests/model/parity.py. Prints the largest relative error of
each, and exits with status 1 where one breaks its bound.
"""

import argparse
import sys

from rich.console import Console
from rich.table import Table
from tests.model.parity import (
    BF16_BOUND,
    CONFIGURATIONS,
    GRADIENTS_BOUND,
    LENGTHS,
    LOGITS_BOUND,
    bf16_errors,
    gradient_errors,
    logits_error,
)
from transformers.utils import logging

COLUMNS = {
    "logits": LOGITS_BOUND,
    "gradients": GRADIENTS_BOUND,
    "bf16 logits": BF16_BOUND,
    "bf16 to fp32, ours": None,
    "bf16 to fp32, theirs": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="random models per configuration")
    seeds = range(parser.parse_args().seeds)
    logging.set_verbosity_error()
    rows = {name: measure(name, seeds) for name in CONFIGURATIONS}
    worst = [max(column) for column in zip(*rows.values(), strict=True)]
    console = Console(width=120)
    console.print(table_of(rows, worst))
    console.print(f"{len(rows)} configurations x {len(seeds)} random models, lengths {LENGTHS}; fp32 unless said.")
    broken = [name for (name, bound), error in zip(COLUMNS.items(), worst, strict=True) if bound and not error < bound]
    if broken:
        sys.exit(f"bound broken: {', '.join(broken)}")


def measure(name: str, seeds: range) -> list[float]:
    """The largest error of each column over the seeds."""
    return [max(column) for column in zip(*(measure_once(name, seed) for seed in seeds), strict=True)]


def measure_once(name: str, seed: int) -> list[float]:
    return [logits_error(name, seed), max(gradient_errors(name, seed).values()), *bf16_errors(name, seed)]


def table_of(rows: dict[str, list[float]], worst: list[float]) -> Table:
    table = Table("configuration", title="largest relative error against transformers")
    for name, bound in COLUMNS.items():
        table.add_column(f"{name}\n(< {bound:.0e})" if bound else name, justify="right")
    for name, errors in rows.items():
        table.add_row(name, *(f"{error:.1e}" for error in errors))
    table.add_section()
    table.add_row("largest", *(f"{error:.1e}" for error in worst))
    return table


if __name__ == "__main__":
    main()

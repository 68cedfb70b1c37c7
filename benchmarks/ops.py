"""The operations on a GPU beside their definitions, other packages and what the card allows at best.

    python -m benchmarks.ops [--only NAME ...] [--json FILE] [--seconds N] [--list]

One process measures the card first, then each case of benchmarks/operations/: its result is compared with the
definition in fp32 on fresh inputs, and where that is red no time is printed and the exit status is 1. Times are
microseconds per call, medians of CUDA events around queued calls, or of replays of a CUDA graph where decoding would
replay one, on inputs that the L2 cache does not hold. "floor" is the larger of (bytes that must move / the card's copy
or read rate) and (FLOPs / its matrix rate). Marks: "*" a peer's time on an H200, scaled by the two cards' rates that
bound the row; "'" a call that was launched by the host where `ours` was replayed from a graph.
"""

import argparse
import dataclasses
import gc
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import benchmarks.operations
import torch
from benchmarks.operations.case import Case
from benchmarks.operations.clock import CudaClock, card_rates
from benchmarks.operations.measure import Clock, Rates, Row, Time, in_a_line, measure
from rich.console import Console
from rich.table import Table
from rich.text import Text

RED, UNUSABLE = 1, 2
NARROWEST = 160  # columns: where no terminal tells its width


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, 1 where a row was refused, or 2 where nothing could be measured."""
    options = parse(arguments)
    cases, faults = found_cases()
    cases = chosen(cases, options.only)
    if options.list:
        console().print(*(f"{module}: {case.operation}, {case.shape}" for module, case in cases), sep="\n")
        return 0
    if not cases and not faults:
        return complain(f"no operation is called {' or '.join(options.only)}; see --list.")
    if not torch.cuda.is_available():
        return complain("this benchmark needs a CUDA device and there is none; see --list for what it would measure.")
    rates = card_rates()
    machine = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    console().print(", ".join(f"{name} {value}" for name, value in machine.items()))
    report = run([case for _, case in cases], CudaClock(), rates, options.seconds, options.json, machine)
    report.faults.extend(faults)
    show(report)
    return report.status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of the names of operations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there, after every row")
    parser.add_argument("--seconds", type=float, default=480.0, metavar="N", help="start no row after this long")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    return parser.parse_args(arguments)


def found_cases() -> tuple[list[tuple[str, Case]], list[str]]:
    """The cases of all files in benchmarks/operations/ with the file's name, and what could not be read."""
    cases: list[tuple[str, Case]] = []
    faults: list[str] = []
    for found in pkgutil.iter_modules(benchmarks.operations.__path__):
        try:
            module = importlib.import_module(f"benchmarks.operations.{found.name}")
            cases.extend((found.name, case) for case in getattr(module, "cases", tuple)())
        except Exception as fault:
            faults.append(f"benchmarks/operations/{found.name}.py: {in_a_line(fault)}")
    return cases, faults


def chosen(cases: list[tuple[str, Case]], only: Iterable[str]) -> list[tuple[str, Case]]:
    wanted = [name.lower() for name in only]
    return [
        (module, case)
        for module, case in cases
        if not wanted or any(name in f"{module} {case.operation}".lower() for name in wanted)
    ]


@dataclasses.dataclass
class Report:
    """Rows as they come, and what is missing."""

    machine: dict[str, Any]
    rates: Rates
    rows: list[Row] = dataclasses.field(default_factory=list)
    not_measured: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)

    @property
    def status(self) -> int:
        return RED if self.faults or any(row.refused for row in self.rows) else 0

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")


def run(
    cases: list[Case],
    clock: Clock,
    rates: Rates,
    seconds: float,
    file: Path | None = None,
    machine: dict[str, Any] | None = None,
) -> Report:
    """Measure one case after the other until the time is over.

    Args:
        clock: a CUDA device's; another one runs the same logic on other inputs.
        seconds: no row is started later than this.
    """
    started = time.monotonic()
    report = Report(machine or {}, rates)
    for case in cases:
        if time.monotonic() - started >= seconds:
            report.not_measured.append(f"{case.operation}, {case.shape}")
            continue
        report.rows.append(measure(case, clock, rates))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if file is not None:
            report.write(file)
    if file is not None:
        report.write(file)
    return report


def show(report: Report) -> None:
    out, rates = console(), report.rates
    speeds = f"copy {rates.copy / 1e12:.2f}, read {rates.read / 1e12:.2f} TB/s"
    products = f"bf16 {rates.bf16 / 1e12:,.0f}, fp8 {rates.fp8 / 1e12:,.0f} TFLOP/s (8192 cubed)"
    out.print(f"the card: {speeds}; {products}")
    out.print(table(report.rows))
    for row in report.rows:
        for name, peer in row.peers.items():
            if isinstance(peer, str):
                out.print(Text(f"{row.operation}, {row.shape}: {name} did not run: {peer}"))
    for fault in report.faults:
        out.print(Text(f"could not be read: {fault}", "red"))
    if report.not_measured:
        out.print(Text(f"Not measured, the time was over: {'; '.join(report.not_measured)}"))
    refused = sum(row.refused is not None for row in report.rows)
    if refused:
        out.print(Text(f"{refused} of {len(report.rows)} rows were refused.", "red"))


def table(rows: list[Row]) -> Table:
    result = Table(title="microseconds per call; (x) how many times as long as ours", title_justify="left")
    for heading in ("operation", "shape", "ours", "definition", "peers", "floor", "ours / floor", "goal"):
        result.add_column(
            heading, justify="right" if heading in ("ours", "definition", "floor", "ours / floor") else "left"
        )
    last = ""
    for row in rows:
        if row.operation != last and last:
            result.add_section()
        result.add_row(row.operation if row.operation != last else "", row.shape, *cells(row), style=style(row))
        last = row.operation
    return result


def cells(row: Row) -> tuple[str, str, str, str, str, str]:
    """From "ours" to "goal"."""
    floor = microseconds(row.floor.seconds)
    if row.ours is None:
        return f"refused: {row.refused}", "", "", floor, "", ""
    ours = row.ours.seconds
    definition = "" if row.definition is None else versus(row.definition, row.ours)
    peers = [f"{name} {versus(time, row.ours)}" for name, time in row.peers.items() if isinstance(time, Time)]
    if row.quoted is not None:
        peers.append(f"{row.quoted[0]} {microseconds(row.quoted[1])}* ({row.quoted[1] / ours:.2f} x)")
    goal = "" if row.goal is None else f"{'met' if row.goal[1] else 'missed'}: {row.goal[0]}"
    return microseconds(ours), definition, "; ".join(peers), floor, f"{ours / row.floor.seconds:.2f}", goal


def versus(other: Time, ours: Time) -> str:
    mark = "'" if other.launched and not ours.launched else ""
    return f"{microseconds(other.seconds)}{mark} ({other.seconds / ours.seconds:.2f} x)"


def microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def style(row: Row) -> str | None:
    if row.refused is not None:
        return "red"
    return "yellow" if row.goal is not None and not row.goal[1] else None


def console() -> Console:
    found = Console(highlight=False, markup=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, width=max(NARROWEST, found.width))


def complain(message: str) -> int:
    Console(stderr=True, highlight=False, markup=False).print(f"benchmarks/ops.py: {message}", soft_wrap=True)
    return UNUSABLE


if __name__ == "__main__":
    sys.exit(main())

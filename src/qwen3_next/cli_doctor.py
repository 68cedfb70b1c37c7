"""What this machine is, what runs each operation on it, and whether it computes what it should."""

import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen3_next.cli_info import in_bytes, memories, two_columns
from qwen3_next.ops.selfcheck import Check, Finding, kernel_language, self_check

_DRIVER = Path("/proc/driver/nvidia/version")
_COLUMNS = {
    ("float32", "outputs"): "fp32",
    ("float32", "gradients"): "gradients",
    ("bfloat16", "outputs"): "bf16",
    ("bfloat16", "gradients"): "gradients",
}


def examine(as_json: bool) -> list[str]:
    """Print what is found; return the names of the operations that are red.

    Args:
        as_json: one JSON object on stdout instead of tables.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = dict(_machine())
    console = Console(soft_wrap=as_json, highlight=False)
    if as_json:
        findings = list(self_check(device))
        console.out(json.dumps(_record(machine, device, findings)))
    else:
        console.print(two_columns("This machine", iter(machine.items())))
        with console.status("checking every operation on small inputs, forward and backward ..."):
            findings = list(self_check(device))
        console.print(_table(findings, device))
        console.print(_verdict(findings, device))
    return [finding.operation for finding in findings if not finding.passed]


def _machine() -> Iterator[tuple[str, str]]:
    for package in ("qwen3-next", "torch", "transformers"):
        yield package, _version(package)
    yield "kernels", kernel_language()
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "CUDA of torch", torch.version.cuda or "none"
    yield "driver", _driver()
    for memory in memories():
        yield memory.name, in_bytes(memory.bytes)
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        free, _ = torch.cuda.mem_get_info(index)
        yield f"cuda:{index}", f"compute capability {major}.{minor}, {in_bytes(free)} free"
    if not torch.cuda.device_count():
        yield "GPU", "none that torch can use"
    yield "free disk for downloads", f"{in_bytes(_free_disk(Path(HF_HOME)))} in {HF_HOME}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed; run from its source"


def _driver() -> str:
    """The version that the kernel module tells; there is none without a card, and on some systems it is elsewhere."""
    try:
        line = _DRIVER.read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return "none found"
    return next((word for word in line.split() if word[0].isdigit() and "." in word), line)


def _free_disk(directory: Path) -> int:
    """Of the file system that holds the directory, or will once it exists."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _record(machine: dict[str, str], device: torch.device, findings: list[Finding]) -> dict[str, Any]:
    operations = [asdict(finding) | {"passed": finding.passed} for finding in findings]
    return {"machine": machine, "device": device.type, "operations": operations}


def _table(findings: list[Finding], device: torch.device) -> Table:
    title = f"On {device.type}: largest relative error beside fp64"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("operation", "runs as", *_COLUMNS.values(), ""):
        table.add_column(heading, no_wrap=True)
    for finding in findings:
        checks = {(check.dtype, check.kind): check for check in finding.checks}
        cells = (_cell(checks.get(column)) for column in _COLUMNS)
        verdict = Text("ok", "green") if finding.passed else Text("RED", "bold red")
        table.add_row(finding.operation, finding.backend, *cells, verdict)
    return table


def _cell(check: Check | None) -> Text:
    if check is None:
        return Text("-")
    return Text(f"{check.error:.1e}", "" if check.passed else "bold red")


def _verdict(findings: list[Finding], device: torch.device) -> Text:
    lines: list[str] = []
    if device.type == "cpu":
        lines.append("No GPU: the plain definitions run. They were compared with themselves in fp64.")
    else:
        lines.extend(f"{', '.join(names)}: {reason}" for reason, names in _reasons(findings).items())
    lines.extend(f"{finding.operation} failed: {finding.fault}" for finding in findings if finding.fault)
    red = [finding.operation for finding in findings if not finding.passed]
    lines.append(f"RED: {', '.join(red)}" if red else f"All {len(findings)} operations compute what they should.")
    return Text("\n".join(lines), "bold red" if red else "")


def _reasons(findings: list[Finding]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        if finding.reason:
            reasons.setdefault(finding.reason, []).append(finding.operation)
    return reasons

"""A row of the comparison, and the rows of the engine in fp8 beside figures of vLLM."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.claim import dense
from benchmarks.operations.measure import Rates

PREFILL, FULL, ONE = "prefill", "decode, as many as fit", "decode, one stream"

VLLM_DENSE: dict[tuple[str, int], tuple[int, float]] = {
    (PREFILL, 4_096): (1, 14_587.0),
    (PREFILL, 32_768): (1, 8_424.0),
    (PREFILL, 131_072): (1, 3_341.0),
    (ONE, 1_024): (1, 84.9),
    (FULL, 32_768): (11, 302.0),
}
"""Streams and tokens per second of vLLM 0.22 with Qwen3-32B in fp8 on one H200: another run."""

DRAFTED = 0.7
"""The share of drafts accepted in the row whose speed with drafts is shown."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One work at one context.

    Attributes:
        streams: of ours and of the dense model.
        ours, dense: tokens per second of all streams together; `dense` None where nobody measured it.
        drafted: ours with drafts, where there is a figure.
        floor: tokens per second that the card's rates allow the dense model.
    """

    work: str
    context: int
    streams: tuple[int, int]
    ours: float
    dense: float | None
    is_fp8: bool
    drafted: float | None = None
    floor: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the dense model."""
        return None if self.dense is None else self.ours / self.dense


def row_of(record: dict[str, Any]) -> Row:
    """Of what `dataclasses.asdict` made."""
    ours, theirs = record["streams"]
    return Row(**(record | dict[str, Any](streams=(ours, theirs))))


def served(record: dict[str, Any]) -> Iterator[Row]:
    """The rows of `benchmarks.serve --json` that the dense model has a figure or a floor for."""
    rates, rows = Rates(**record["rates"]), {row["work"]: row for row in record["rows"]}
    for name, row in rows.items():
        found = work_of(name)
        if found is None or row["seconds"] is None:
            continue
        work, context = found
        ours, measured = row["tokens"] / row["seconds"], VLLM_DENSE.get(found)
        count = 1 if work == PREFILL else row["tokens"]
        theirs = measured[0] if measured else 1
        floor = context / dense.prompt_floor(context, rates)
        if work != PREFILL:
            floor = theirs / dense.step_floor(theirs, context, rates)
        drafts = rows.get(f"drafts at {DRAFTED:.0%}, {count} streams")
        gain = drafts["figures"]["ratio"] if drafts and (work, context) == (ONE, 1_024) else None
        yield Row(
            work=work,
            context=context,
            streams=(count, theirs),
            ours=ours,
            dense=measured[1] if measured else None,
            is_fp8=True,
            drafted=None if gain is None else gain * ours,
            floor=floor,
        )


def work_of(name: str) -> tuple[str, int] | None:
    """What a row of the engine's benchmark is here, and its context."""
    for pattern, work in (
        (r"prefill ([\d,]+)", PREFILL),
        (r"decode at ([\d,]+), as many as fit", FULL),
        (r"decode 1, context ([\d,]+)", ONE),
    ):
        if match := re.fullmatch(pattern, name):
            return work, int(match[1].replace(",", ""))
    return None

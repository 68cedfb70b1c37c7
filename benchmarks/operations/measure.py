"""How one row is checked, timed and judged. Nothing here needs a GPU; what reads the clock of one is in clock.py."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from benchmarks.operations.case import Case, Inputs, Run
from torch import Tensor

COLD_BYTES = 200e6
"""What the timed calls of a row touch before they come back to the first inputs: four times the L2 cache of an H100."""

MOST_SETS = 64


class Time(NamedTuple):
    """Seconds of one call, and whether it was launched by the host rather than replayed from a CUDA graph."""

    seconds: float
    launched: bool


class Clock(Protocol):
    """Times a function over sets of inputs in turn."""

    def time(self, run: Run, sets: list[Inputs], graph: bool) -> Time: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What the card does at best: bytes per second copied (read + written) and read, FLOP per second in products."""

    copy: float
    read: float
    bf16: float
    fp8: float


H200 = Rates(copy=4.26e12, read=4.40e12, bf16=804e12, fp8=1462e12)
"""The card that quoted times were taken on."""


class Floor(NamedTuple):
    """The least time that the card allows, and the rate that sets it."""

    seconds: float
    rate: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a case; times in seconds per call. `refused` says why there are none.

    Attributes:
        peers: seconds, or why there are none.
        quoted: a time taken elsewhere, scaled to this card.
        goal: the goal in words and how far it is, and whether it is met; None where the case sets none.
    """

    operation: str
    shape: str
    floor: Floor
    refused: str | None = None
    error: float | None = None
    ours: Time | None = None
    definition: Time | None = None
    peers: dict[str, Time | str] = dataclasses.field(default_factory=dict)
    quoted: tuple[str, float] | None = None
    goal: tuple[str, bool] | None = None


def measure(case: Case, clock: Clock, rates: Rates, memory: float = 24e9) -> Row:
    """Check a case on fresh inputs; only where that holds, time it.

    Args:
        memory: bytes that all sets of inputs may take.
    """
    floor = floor_of(case, rates)
    known: dict[str, Any] = {"operation": case.operation, "shape": case.shape, "floor": floor}
    try:
        error = check(case)
    except Exception as fault:
        return Row(**known, refused=f"the check failed: {in_a_line(fault)}")
    known["error"] = error
    if not error <= case.tolerance:  # NaN as well
        return Row(**known, refused=f"error {error:.2g} > {case.tolerance:.2g}")
    sets = input_sets(case, memory)
    try:
        ours = clock.time(case.ours, sets, case.graph)
    except Exception as fault:
        return Row(**known, refused=f"the timed run failed: {in_a_line(fault)}")
    definition = None if case.timed_definition is None else _attempt(clock, case.timed_definition, sets, False)
    peers = {name: _attempt(clock, run, sets, case.graph) for name, run in case.peers.items() if run is not None}
    if isinstance(definition, str):
        peers["the definition"] = definition
    quoted = None if case.quoted is None else (case.quoted[0], scaled(case.quoted[1] * 1e-6, floor, rates))
    return Row(
        **known,
        ours=ours,
        definition=definition if isinstance(definition, Time) else None,
        peers=peers,
        quoted=quoted,
        goal=goal_of(case, floor, ours, peers, quoted),
    )


def check(case: Case) -> float:
    """The largest error over the outputs of one run. The definition gets copies, 16-bit numbers made 32 bits wide."""
    inputs = case.make()
    wide = widened(inputs)
    return error_of(case.ours(*inputs), case.definition(*wide))


def floor_of(case: Case, rates: Rates) -> Floor:
    """The larger of the memory's and the tensor cores' time.

    A byte that is read for each one written goes at the copy rate, which counts both; what is read beyond that at the
    read rate, what is written beyond it at the copy rate.
    """
    paired = 2 * min(case.read_bytes, case.written_bytes)
    only_read = max(0.0, case.read_bytes - case.written_bytes)
    only_written = max(0.0, case.written_bytes - case.read_bytes)
    memory = (paired + only_written) / rates.copy + only_read / rates.read
    products = case.flops / getattr(rates, case.rate)
    return Floor(products, case.rate) if products > memory else Floor(memory, "copy")


def scaled(seconds: float, floor: Floor, rates: Rates) -> float:
    """A time of an H200 on this card: by the rate that bounds the row, the copy rate where that is the memory."""
    return seconds * getattr(H200, floor.rate) / getattr(rates, floor.rate)


def goal_of(
    case: Case, floor: Floor, ours: Time, peers: dict[str, Time | str], quoted: tuple[str, float] | None
) -> tuple[str, bool] | None:
    """A multiple of the floor, or else the fastest peer, measured or quoted."""
    if case.goal is not None:
        ratio = ours.seconds / floor.seconds
        return f"{case.goal:g} x floor ({ratio:.2f} x)", ratio <= case.goal
    rivals = {name: time.seconds for name, time in peers.items() if isinstance(time, Time)}
    if quoted is not None:
        rivals[f"{quoted[0]}*"] = quoted[1]
    if not rivals:
        return None
    best = min(rivals, key=rivals.__getitem__)
    ratio = ours.seconds / rivals[best]
    return f"{best} ({ratio:.2f} x)", ratio <= 1


def _attempt(clock: Clock, run: Run, sets: list[Inputs], graph: bool) -> Time | str:
    """Peers may fail without spoiling the row."""
    try:
        return clock.time(run, sets, graph)
    except Exception as fault:
        return in_a_line(fault)


def input_sets(case: Case, memory: float) -> list[Inputs]:
    """As many fresh inputs as it takes for a call to find nothing of its last run in the cache."""
    sets = [case.make()]
    size = max(1, bytes_of(sets[0]))
    touched = max(1.0, min(size, case.read_bytes + case.written_bytes))
    count = min(MOST_SETS, -(-COLD_BYTES // touched), memory // size)
    sets.extend(case.make() for _ in range(int(count) - 1))
    return sets


def error_of(result: Any, expected: Any) -> float:
    """The largest `|result - expected| / |expected|` of the outputs; of whole numbers, the share that differs.

    NaN wherever anything is not finite that should be; shapes that differ are an error of their own.
    """
    pairs = zip(tensors_of(result), tensors_of(expected), strict=True)
    errors = [_error(a, b) for a, b in pairs]
    return float("nan") if any(e != e for e in errors) else max(errors)


def _error(result: Tensor, expected: Tensor) -> float:
    if result.shape != expected.shape:
        raise ValueError(f"an output has the shape {list(result.shape)}, its definition {list(expected.shape)}")
    if not (result.is_floating_point() or expected.is_floating_point()):
        return (result != expected).double().mean().item() if result.numel() else 0.0
    difference = _norm(result.to(expected.device), minus=expected)
    return difference / max(_norm(expected), 1e-300)


def _norm(x: Tensor, minus: Tensor | None = None) -> float:
    """In fp64, a part at a time: the outputs of the largest cases have billions of bytes."""
    x = x.reshape(-1)
    others = [None] * len(x.split(2**26)) if minus is None else minus.reshape(-1).split(2**26)
    parts = [
        (part.double() if other is None else part.double() - other.double()).square().sum()
        for part, other in zip(x.split(2**26), others, strict=True)
    ]
    return float(sum(parts)) ** 0.5


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from tensors_of(part)
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            yield from tensors_of(getattr(value, part.name))


def bytes_of(inputs: Inputs) -> int:
    """Of the memory behind all tensors, each counted once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(inputs)}
    return sum(storages.values())


def widened(value: Any) -> Any:
    """A copy in which no tensor shares memory with `value` and 16-bit floating-point numbers have 32 bits."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value.clone()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(widened(part) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(widened(part) for part in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: widened(getattr(value, part.name)) for part in dataclasses.fields(value) if part.init}
        return dataclasses.replace(value, **parts)
    return value


def in_a_line(fault: Exception) -> str:
    """The kind of an exception and the start of what it says."""
    text = " ".join(str(fault).split())
    return f"{type(fault).__name__}: {text}"[:160]

"""One row of the table of operations: what runs, on which inputs, and what it is compared with."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Inputs = tuple[Any, ...]
Run = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one shape.

    Attributes:
        operation: its name in the table; rows of one operation stand together.
        shape: of the inputs, short.
        make: fresh random inputs on the GPU, in the order that `ours`, `definition` and the peers take them. Called
            several times: the timed calls cycle through at least 200 MB of them, so that they find a cold L2 cache.
        ours: the operation under test. May return a tensor or a tuple of tensors.
        definition: the same by the plain definition, for the check. It gets copies of the inputs, in which every bf16
            and fp16 tensor, also inside dataclasses and tuples, is fp32; others (fp8, integers, fp32) stay so ...
        timed_definition: ... and for the clock, in the dtype of the inputs; None where it would not fit or end.
        peers: other implementations, by name; None where a peer is not installed.
        read_bytes: what `ours` has to read at least, in bytes.
        written_bytes: what it has to write at least.
        flops: floating-point operations that it has to do on the tensor cores.
        rate: which matrix rate of the card bounds them.
        tolerance: largest |ours - definition| / |definition|, per output; of outputs that are whole numbers, the
            largest share that differs.
        quoted: a peer's time in microseconds on an H200 (name, time), scaled by the rates of the two cards that bound
            the row.
        goal: largest allowed multiple of the floor; None where the goal is to be no slower than `quoted` or the peers.
        graph: time replays of a CUDA graph, as decoding runs; else queued launches, each between two events.

    Gradients are enabled in every call, and no input asks for one unless `ours` makes it.
    """

    operation: str
    shape: str
    make: Callable[[], Inputs]
    ours: Run
    definition: Run
    timed_definition: Run | None = None
    peers: dict[str, Run | None] = field(default_factory=dict)
    read_bytes: float
    written_bytes: float
    flops: float = 0.0
    rate: Literal["bf16", "fp8"] = "bf16"
    tolerance: float
    quoted: tuple[str, float] | None = None
    goal: float | None = None
    graph: bool = False

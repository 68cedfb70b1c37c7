"""The clock of a CUDA device, and the card's own speeds, which every row is held against."""

import math
import statistics
import warnings
from collections.abc import Callable
from itertools import cycle, islice

import torch
from benchmarks.operations.case import Inputs, Run
from benchmarks.operations.measure import Rates, Time

CALLS_OF_A_GRAPH = 8
SECONDS_OF_A_ROW = 0.2
SLOW_SECONDS = 0.1
HEAD_START_CYCLES = 40_000_000  # about 20 ms, in which the host queues calls


class CudaClock:
    """Medians of CUDA events around calls that wait in the queue, so that the gaps of launching do not count.

    A call that waits for the host itself cannot be queued: its gaps count, because they are its own.
    """

    def time(self, run: Run, sets: list[Inputs], graph: bool) -> Time:
        first = _seconds(lambda: run(*sets[0]))
        if first > SLOW_SECONDS:  # moves so much that nothing of it stays in a cache
            sets = sets[:1]
        for inputs in sets:  # also fills what an argument caches, like the chunks of its segments
            run(*inputs)
        if graph and _queues_only(run, sets[0]):
            return Time(self._replayed(run, sets), launched=False)
        calls = [lambda inputs=inputs: run(*inputs) for inputs in sets]
        return Time(_median(calls, _repeats(min(first, _seconds(calls[0])))), launched=True)

    def _replayed(self, run: Run, sets: list[Inputs]) -> float:
        calls = max(CALLS_OF_A_GRAPH, len(sets))
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for inputs in islice(cycle(sets), calls):
                run(*inputs)
        graph.replay()
        return _median([graph.replay], _repeats(_seconds(graph.replay))) / calls


def _queues_only(run: Run, inputs: Inputs) -> bool:
    """Whether a call never makes the host wait for the device; a graph could not hold it otherwise."""
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings(action="ignore"):  # that this mode does not find every wait
            torch.cuda.set_sync_debug_mode("error")
        run(*inputs)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def _repeats(seconds: float) -> int:
    return max(3, min(50, math.ceil(SECONDS_OF_A_ROW / seconds)))


def _median(calls: list[Callable[[], object]], repeats: int) -> float:
    """Seconds; the calls take turns, each between two events, all of them queued while the device sleeps."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START_CYCLES)
    for (begin, end), call in zip(pairs, cycle(calls), strict=False):
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def _seconds(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return max(begin.elapsed_time(end) / 1e3, 1e-7)


def card_rates() -> Rates:
    """Copy, read and matrix product, as torch does them, on tensors that no cache holds."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source))
    read = source.nbytes / min(_best(source.sum), _best(source.amax))
    del source, target
    flops = 2 * 8192**3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16 = flops / _best(lambda: a @ b.T)
    a, b = (x.to(torch.float8_e4m3fn) for x in (a, b))
    one = torch.ones((), device="cuda")
    options = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
    fp8 = flops / _best(lambda: torch._scaled_mm(a, b.T, **options))
    return Rates(copy=copy, read=read, bf16=bf16, fp8=fp8)


def _best(call: Callable[[], object]) -> float:
    call()
    return _median([call], _repeats(_seconds(call)))

"""One model on several GPUs beside one: whether they compute the same, and how fast each of the two cuts is.

    torchrun --nproc-per-node 2 -m benchmarks.parallel [--layers 8] [--rows prefill decode] [--json FILE]

First the checks, at the published shapes of 80B with four layers and random weights in bf16 and in block-fp8: logits of
given texts, read and then decoded, from all ranks and from one, each beside the same weights computed in fp32; then
greedy text of the model in the package. Where they differ nothing is timed. Then an engine with fp8 weights, alone on
the first rank while the others wait, with all heads cut (tp), and with the experts cut (ep). "collectives" is their
share of the time in which the first rank's device is busy, waiting for a slower rank included.
"""

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from benchmarks.serving.forced import unread_prompts
from benchmarks.serving.rows import head_seconds
from benchmarks.serving.setting import (
    LAYERS,
    Setting,
    added,
    first_token,
    random_model,
    stopped,
    timed_steps,
    until_all_decode,
)
from rich.console import Console
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qwen3_next import LLM, EngineConfig, SamplingParams
from qwen3_next.engine import Engine
from qwen3_next.engine.parallel import Orders, ParallelEngine, Ranks
from qwen3_next.model import PackedCache, PackedInputs, PackedMemory
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.ops import Segments, use

T = TypeVar("T")

CHECKED_LAYERS = 4
TEXTS = ((170, 70, 9), (1, 1, 1), (1, 1, 1))
"""New tokens of three texts in the calls that are compared."""

PAGES = 8
TOLERANCE, LEAST = 1.5, 1e-5
"""How far logits of several ranks may be from those in fp32, in units of how far those of one GPU are, and in parts of
the logits where the one is exact. Each partial sum is rounded once more, to the dtype of all sums."""

PROMPTS = ("Once upon a time, in a small village by the sea,", "def add(a, b):\n    return", "import json\n\nclass")

RED, UNUSABLE = 1, 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured."""

    prompt: int = 32_768
    context: int = 1_024
    streams: tuple[int, ...] = (1, 16, 64)
    steps: int = 24
    repeats: int = 2
    token_budget: int = 8_192
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a call took.

    Attributes:
        where: the cut.
        seconds: with the layers there are.
        scaled: at 48 layers.
        collectives: share of the busy time; None without a GPU.
        ratio: how many times as fast as one GPU, with the layers there are.
    """

    where: str
    work: str
    tokens: int
    seconds: float
    scaled: float
    collectives: float | None
    ratio: float = 1.0

    def __str__(self) -> str:
        """One line of the report."""
        share = "" if self.collectives is None else f"  collectives {self.collectives:4.0%}"
        return (
            f"{self.where:6} {self.work:24} {self.seconds * 1e3:9.2f} ms {self.tokens / self.seconds:9,.0f} tok/s  "
            f"{self.ratio:4.2f} x one{share}  (SCALED to {LAYERS} layers: {self.scaled * 1e3:9.2f} ms "
            f"{self.tokens / self.scaled:9,.0f} tok/s)"
        )


def main(
    arguments: Sequence[str] | None = None, settings: dict[str, Any] | None = None, sizes: Sizes | None = None
) -> int:
    """Run the benchmark on each rank; return 0, 1 where ranks compute something else, or 2 without enough of them.

    Args:
        settings: changes of the published shapes.
    """
    options = parse(arguments)
    out = Console(highlight=False, markup=False, soft_wrap=True, quiet=int(os.environ.get("RANK", "0")) > 0)
    count, is_cuda = int(os.environ.get("WORLD_SIZE", "1")), options.device != "cpu"
    if count < 2 or (is_cuda and torch.cuda.device_count() < count):
        out.print("benchmarks/parallel.py needs a GPU for each of at least two processes; torchrun starts them.")
        return UNUSABLE
    os.environ["NCCL_NVLS_ENABLE"] = "0"  # multicast needs rights that not every machine gives
    cuts = {"tp": Ranks.join(count, 1, options.device), "ep": Ranks.join(1, count, options.device)}
    bench = Bench(cuts, settings or {}, sizes or Sizes(), options, out)
    card = torch.cuda.get_device_name() if is_cuda else "CPU"
    out.print(f"{count} x {card}, torch {torch.__version__}, {options.layers} layers")
    if not all(bench.any_rank.on_all(lambda: [check(bench) for check in (same_logits, same_text)])):
        out.print("the ranks do not compute what one does; nothing is timed")
        return RED
    rows = list(measured(bench))
    if options.json is not None and bench.any_rank.leads:
        record = {"card": card, "ranks": count, "layers": options.layers, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantizations", nargs="+", choices=("fp8", "none"), default=["none", "fp8"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    return parser.parse_args(arguments)


@dataclass(frozen=True, eq=False)
class Bench:
    """What all parts use.

    Attributes:
        cuts: the same processes, by what is cut.
    """

    cuts: dict[str, Ranks]
    settings: dict[str, Any]
    sizes: Sizes
    options: argparse.Namespace
    out: Console

    @property
    def any_rank(self) -> Ranks:
        return self.cuts["tp"]

    def model(self, layers: int, quantization: str, ranks: Ranks | None = None) -> Any:
        shard, device = None if ranks is None else ranks.shard, self.any_rank.device
        return random_model(self.settings, layers, device, quantization, self.options.dtype, shard)

    def first_alone(self, work: Callable[[], T]) -> T | None:
        """Let the first rank work, while the others wait without a collective of their devices."""
        result = work() if self.any_rank.leads else None
        free_memory()
        dist.barrier(self.any_rank.control)
        return result


def same_logits(bench: Bench) -> bool:
    """Whether each cut is as near to the truth as one GPU is."""
    is_same = True
    for quantization in bench.options.quantizations:
        found = bench.first_alone(lambda q=quantization: alone_and_exact(bench, q))
        for name, ranks in bench.cuts.items():
            ours = logits(bench.model(CHECKED_LAYERS, quantization, ranks).model)
            free_memory()
            if found is None:
                continue
            alone, exact = found
            error, allowed = distance(ours, exact), max(TOLERANCE * distance(alone, exact), LEAST)
            is_same &= error <= allowed
            bench.out.print(
                f"logits, {name}, weights {bench.options.dtype if quantization == 'none' else quantization}: "
                f"{distance(ours, alone):.4f} from one GPU's; {error:.4f} from fp32, {allowed:.4f} allowed"
            )
    return bench.any_rank.least(int(is_same)) == 1


def alone_and_exact(bench: Bench, quantization: str) -> tuple[Tensor, Tensor]:
    """Logits of one GPU, and the same weights' in fp32 by the definitions."""
    model = bench.model(CHECKED_LAYERS, quantization).model
    alone = logits(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.element_size() > 1:
                setattr(module, name, nn.Parameter(parameter.data.float(), requires_grad=False))
    with use("reference"):
        return alone, logits(model)


@torch.inference_mode()
def logits(model: BareCausalLM) -> Tensor:
    """Of all tokens of `TEXTS`, which are the same everywhere."""
    config, device, count = model.config, model.lm_head.weight.device, len(TEXTS[0])
    memory = PackedMemory.allocate(
        config, pages=PAGES * count, slots=count, dtype=model.lm_head.weight.dtype, device=device
    )
    table = torch.arange(PAGES * count, dtype=torch.int32, device=device).view(count, PAGES)
    slots, random = torch.arange(count, dtype=torch.int32, device=device), torch.Generator().manual_seed(1)
    found, before = list[Tensor](), [0] * count
    for news in TEXTS:
        after = [a + b for a, b in zip(before, news, strict=True)]
        segments = Segments.from_lengths(news, device)
        tokens = torch.randint(0, config.vocab_size, (segments.total,), generator=random).to(device)
        positions = segments.offsets + torch.tensor(before, device=device)[segments.sequence_ids]
        lengths = torch.tensor(after, dtype=torch.int32, device=device)
        cache = PackedCache(memory, table, lengths, slots, known_lengths=tuple(after))
        found.append(model.lm_head(model.model(PackedInputs(tokens, positions, segments), cache)).float().cpu())
        before = after
    return torch.cat(found)


def distance(a: Tensor, b: Tensor) -> float:
    """Relative, by norm; infinite where one is not finite."""
    found = float((a - b).norm() / b.norm())
    return found if found == found else float("inf")


def same_text(bench: Bench) -> bool:
    """Whether the model in the package writes the same with each cut as alone."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    config = EngineConfig(max_sequences=4, token_budget=256, max_context=256, memory_bytes=2**27, drafts=0)

    def written(tp: int = 1, ep: int = 1) -> list[tuple[int, ...]] | None:
        llm = LLM(dtype="float32", device=bench.any_rank.device, config=config, tp=tp, ep=ep)
        if isinstance(llm.engine, ParallelEngine) and not llm.engine.ranks.leads:
            llm.engine.follow()
            return None
        found = [one.token_ids for (one,) in llm.generate(PROMPTS, params, progress=False)]
        if isinstance(llm.engine, ParallelEngine):
            llm.engine.close()
        return found

    alone, count, is_same = bench.first_alone(written), dist.get_world_size(), True
    for name in bench.cuts:
        is_same &= written(**{name: count}) == alone
        free_memory()
    bench.out.print(f"greedy text of the model in the package: {'the same' if is_same else 'DIFFERS'}")
    return bench.any_rank.least(int(is_same)) == 1


def measured(bench: Bench) -> Iterator[Row]:
    """Print each row when it is there."""
    one = dict[str, float]()
    quantization = bench.options.quantizations[-1]

    def shown(where: str, ranks: Ranks | None) -> list[Row]:
        setting = Setting(bench.model(bench.options.layers, quantization, ranks), ranks=ranks)
        rows = list[Row]()
        for name in bench.options.rows:
            for row in ROWS[name](bench, setting):
                one.setdefault(row.work, row.seconds)
                rows.append(replace(row, where=where, ratio=one[row.work] / row.seconds))
                bench.out.print(str(rows[-1]))
        setting.close()
        return rows

    yield from bench.first_alone(lambda: shown("one", None)) or ()
    for name, ranks in bench.cuts.items():
        yield from shown(f"{name} {dist.get_world_size()}", ranks)
        free_memory()


def prefill(bench: Bench, setting: Setting) -> Iterator[Row]:
    sizes = bench.sizes
    engine = setting.engine(
        max_sequences=1, max_context=sizes.prompt + 64, drafts=0, token_budget=sizes.token_budget,
        prefix_cache=False, memory_bytes=sizes.memory_bytes,
    )  # fmt: skip
    prompt = setting.prompt(sizes.prompt)

    def times() -> tuple[float, float | None]:
        found = [first_token(engine, prompt)[0] for _ in range(1 + sizes.repeats)]
        return statistics.median(found[1:]), collectives(lambda: first_token(engine, prompt))

    yield from row_of(bench, setting, engine, f"prefill {sizes.prompt:,}", (sizes.prompt, 1), times)
    closed(engine)


def decode(bench: Bench, setting: Setting) -> Iterator[Row]:
    sizes, steps = bench.sizes, bench.sizes.steps
    engine = setting.engine(
        max_sequences=max(sizes.streams), max_context=sizes.context + 3 * steps + 64, drafts=0,
        token_budget=sizes.token_budget, prefix_cache=False, memory_bytes=sizes.memory_bytes,
    )  # fmt: skip
    for streams in sizes.streams:
        prompts = [setting.prompt(sizes.context) for _ in range(streams)]

        def fill(prompts: list[tuple[int, ...]] = prompts) -> list[str]:
            names = added(engine, prompts, 3 * steps + 40)
            until_all_decode(engine, names)
            return names

        with unread_prompts(engine):
            names = led(engine, fill)

        def times(names: list[str] | None = names) -> tuple[float, float | None]:
            seconds = timed_steps(engine, 4, steps).seconds
            share = collectives(lambda: timed_steps(engine, 0, 4))
            stopped(engine, names or ())
            return seconds, share

        yield from row_of(
            bench, setting, engine, f"decode {streams}, context {sizes.context:,}", (streams, streams), times
        )
    closed(engine)


ROWS: dict[str, Callable[[Bench, Setting], Iterator[Row]]] = {"prefill": prefill, "decode": decode}


def row_of(
    bench: Bench,
    setting: Setting,
    engine: Engine,
    work: str,
    tokens: tuple[int, int],
    times: Callable[[], tuple[float, float | None]],
) -> Iterator[Row]:
    """The row on the first rank, none on the others.

    Args:
        tokens: of the call, and rows of the head.
    """
    found = led(engine, times)
    head = head_seconds(engine, tokens[1])  # on all ranks, for it gathers
    if found is not None:
        seconds, share = found
        scaled = (seconds - head) * LAYERS / len(setting.loaded.model.model.layers) + head
        yield Row(where="", work=work, tokens=tokens[0], seconds=seconds, scaled=scaled, collectives=share)


def led(engine: Engine, work: Callable[[], T]) -> T | None:
    """Work on the first rank, which the others follow until it is done."""
    if not isinstance(engine, ParallelEngine):
        return work()
    if not engine.ranks.leads:
        engine.follow()
        return None
    result = work()
    engine.ranks.tell(Orders(is_end=True))
    return result


def closed(engine: Engine) -> None:
    if isinstance(engine, ParallelEngine):
        engine.close() if engine.ranks.leads else engine.follow()


def collectives(run: Callable[[], object]) -> float | None:
    """The share of a device's busy time that NCCL's kernels take; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() or () if event.device_type == DeviceType.CUDA]
    total = sum(event.device_time for event in kernels)
    return sum(event.device_time for event in kernels if "nccl" in event.name.lower()) / total


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    code = main()
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)

"""The whole network at the published shapes on one GPU, without an engine around it: prefill and decoding.

    python -m benchmarks.alone [--weights fp8 bf16] [--work prefill decode] [--profile] [--json FILE]

Weights are random and made on the device: four layers, the pattern of three DeltaNet layers and an attention layer,
that run twelve times each. What four of them read for a token is several times what an L2 cache holds, so that each
finds its weights in memory, as 48 different ones would. Pages, slots and the head (greedy) are those of the real model;
a decode step is one CUDA graph. "floor" is what a step must read at the card's own read rate: the weights of as many
distinct experts as are expected, states (written as well), keys and values, head. Of a prompt it is the FLOPs of its
projections, experts and attention at the card's matrix rates. Nothing is timed where the network differs from its
definition.
"""

import argparse
import copy
import dataclasses
import gc
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from benchmarks.model import SHAPES_80B
from benchmarks.operations.clock import card_rates
from benchmarks.operations.measure import Rates
from rich.console import Console
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from qwen3_next.model import PackedCache, PackedInputs, PackedMemory, quantize_
from qwen3_next.model.decoder import DecoderLayer
from qwen3_next.model.network import Wanted
from qwen3_next.ops import Segments, linear_argmax, use
from qwen3_next.ops.pages import PAGE

PUBLISHED: dict[str, Any] = SHAPES_80B | {
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25},
}
LAYERS, PATTERN = 48, 4
PROMPTS = (4_096, 32_768)
STREAMS, CONTEXT = (1, 16, 64), 1_024
REPEATS = 20

CHECKED = ((70, 200, 9), (1, 1, 1), (2, 1, 3))
"""New tokens of three sequences in the calls that are compared with the definition."""

TOLERANCE = 1.5
"""How far from the definitions in fp32 a layer may be, in units of how far the definitions themselves are in bf16.

With fp8 that is several times as far as with bf16 weights: an activation between two codes goes to either.
"""

RED, UNUSABLE = 1, 2


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured call of the network and the least that the card allows, both in seconds."""

    weights: str
    work: str
    tokens: int
    seconds: float
    floor: float

    def __str__(self) -> str:
        """One line of the report."""
        speed, best = self.tokens / self.seconds, self.tokens / self.floor
        return (
            f"{self.weights:5} {self.work:28} {self.seconds * 1e3:9.2f} ms {speed:10,.0f} tok/s   "
            f"floor {self.floor * 1e3:8.2f} ms {best:10,.0f} tok/s   {self.seconds / self.floor:5.2f} x"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, 1 where the network differs from its definition, or 2 without a GPU."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        Console(stderr=True).print("benchmarks/alone.py: this benchmark needs a CUDA device and there is none.")
        return UNUSABLE
    out, rates, rows = Console(highlight=False, markup=False, width=150), card_rates(), list[Row]()
    out.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, read {rates.read / 1e12:.2f} TB/s")
    with torch.inference_mode():
        for weights in options.weights:
            model = random_model(PUBLISHED, "cuda", fp8=weights == "fp8")
            found = differences(model)
            worst = max(found, key=lambda one: one.ratio)
            out.print(
                f"{weights}: {worst.ours:.4f} from the definitions in fp32 where those in bf16 are {worst.theirs:.4f}; "
                f"{worst.ratio:.2f} times as far, {TOLERANCE} allowed"
            )
            if not all(one.ratio <= TOLERANCE for one in found):
                return RED
            repeat_layers_(model, LAYERS)
            rows += measured(model, weights, rates, options, out)
            del model
            gc.collect()
            torch.cuda.empty_cache()
    if options.json is not None:
        record = {"card": torch.cuda.get_device_name(), "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--weights", nargs="+", choices=("fp8", "bf16"), default=["fp8", "bf16"])
    parser.add_argument("--work", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--profile", action="store_true", help="also print the kernels by their time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    return parser.parse_args(arguments)


def random_model(
    settings: dict[str, Any], device: str, fp8: bool, dtype: torch.dtype = torch.bfloat16, layers: int = PATTERN
) -> Any:
    """A few layers, without the MTP layer."""
    config = Qwen3NextConfig(**settings, num_hidden_layers=layers, num_nextn_predict_layers=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            torch.manual_seed(0)
            model = Qwen3NextForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    if fp8:
        quantize_(model)
    return model


def repeat_layers_(model: Qwen3NextForCausalLM, count: int) -> None:
    """Make the network `count` layers deep; the same ones, with the same pages and slots, come again and again."""
    layers = list(model.model.layers)
    model.model.layers = nn.ModuleList(layers[i % len(layers)] for i in range(count))


class Batch:
    """Sequences in pages and slots of their own, and the next call of the network with them."""

    def __init__(self, model: Qwen3NextForCausalLM, count: int, longest: int, dtype: torch.dtype | None = None) -> None:
        """Room for `count` sequences of up to `longest` tokens, in the model's dtype or another."""
        each, device = -(-longest // PAGE), model.device
        self.model, self.lengths = model, [0] * count
        self.memory = PackedMemory.allocate(
            model.config, pages=count * each, slots=count, dtype=dtype or model.dtype, device=device
        )
        self.table = torch.arange(count * each, dtype=torch.int32, device=device).view(count, each)
        self.slots = torch.arange(count, dtype=torch.int32, device=device)

    def call(self, news: Sequence[int], known: bool = True) -> Callable[[], Tensor]:
        """The network over so many new tokens of each sequence, random ones; gives their hidden states."""
        inputs, cache = self.prepare(news, known)
        return lambda: self.model.model.forward_packed(inputs, cache, wanted=Wanted(routings=False)).hidden

    def prepare(self, news: Sequence[int], known: bool = True) -> tuple[PackedInputs, PackedCache]:
        """What the network reads and writes in that call."""
        device, before = self.model.device, self.lengths
        self.lengths = [a + b for a, b in zip(before, news, strict=True)]
        segments = Segments.from_lengths(news, device)
        tokens = torch.randint(0, self.model.config.vocab_size, (segments.total,), device=device)
        positions = segments.offsets + torch.tensor(before, device=device)[segments.sequence_ids]
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        host = tuple(self.lengths) if known else None
        cache = PackedCache(self.memory, self.table, lengths, self.slots, known_lengths=host)
        return PackedInputs(tokens, positions, segments), cache


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far one layer's addition to its input is, root mean square, from what the definitions add in fp32.

    Attributes:
        ours: of the layer as it runs.
        theirs: of the definitions in the model's own dtype.
    """

    ours: float
    theirs: float

    @property
    def ratio(self) -> float:
        """NaN, which no tolerance holds, becomes infinity."""
        ratio = self.ours / self.theirs
        return ratio if ratio == ratio else float("inf")


def differences(model: Qwen3NextForCausalLM) -> list[Difference]:
    """Of every layer in every call, from the same input.

    The definitions use the same experts: random routers give many of them the same score, and then either is right.
    """
    room = len(CHECKED[0]), sum(map(max, CHECKED))
    ours, theirs, exact = (Batch(model, *room, dtype) for dtype in (model.dtype, model.dtype, torch.float32))
    layers = list(model.model.layers)
    wide_layers = [widened(layer) for layer in layers]
    found: list[Difference] = []
    for news in CHECKED:
        (inputs, cache), (_, other), (_, wide_cache) = (batch.prepare(news) for batch in (ours, theirs, exact))
        x = model.model.embed_tokens(inputs.token_ids)
        rotary, wide_rotary = (model.model.rotary_emb(y, inputs.positions) for y in (x, x.float()))
        for layer, wide in zip(layers, wide_layers, strict=True):
            result = layer(x, inputs, rotary, cache)
            with use("reference"):
                same = layer(x, inputs, rotary, other, experts=result.experts).hidden.float()
                truth = wide(x.float(), inputs, wide_rotary, wide_cache, experts=result.experts).hidden
            added = (truth - x.float()).norm()
            errors = [float((hidden.float() - truth).norm() / added) for hidden in (result.hidden, same)]
            found.append(Difference(*errors))
            x = result.hidden
    return found


def widened(layer: nn.Module) -> nn.Module:
    """A copy whose parameters are fp32, but for those in fp8."""
    copied = copy.deepcopy(layer)
    for parameter in copied.parameters():
        if parameter.element_size() > 1:
            parameter.data = parameter.data.float()
    return copied


def measured(
    model: Qwen3NextForCausalLM, weights: str, rates: Rates, options: argparse.Namespace, out: Console
) -> list[Row]:
    """Time what was asked for, and print each row when it is there."""
    rows: list[Row] = []

    def add(work: str, tokens: int, floor: float, call: Callable[[], object], repeats: int) -> None:
        rows.append(Row(weights, work, tokens, seconds(call, repeats), floor))
        out.print(str(rows[-1]))
        if options.profile:
            out.print(kernels(call))

    for length in PROMPTS if "prefill" in options.work else ():
        floor = prompt_flops(model, length)
        rate = rates.fp8 if weights == "fp8" else rates.bf16
        network, head = Batch(model, 1, length).call([length]), model.lm_head.weight
        least = floor[0] / rate + floor[1] / rates.bf16
        add(f"prefill {length:,}", length, least, lambda n=network, h=head: linear_argmax(n()[-1:], h), 3)
    for streams in STREAMS if "decode" in options.work else ():
        add(
            f"decode {streams}, context {CONTEXT:,}",
            streams,
            step_bytes(model, streams, CONTEXT) / rates.read,
            replayed(step(model, streams, CONTEXT)),
            REPEATS,
        )
    return rows


def step(model: Qwen3NextForCausalLM, streams: int, context: int) -> Callable[[], Tensor]:
    """One new token of each sequence after a context of random keys, values and states; gives the next ones."""
    batch = Batch(model, streams, context)
    for kept in (batch.memory.keys, batch.memory.values, batch.memory.recurrent, batch.memory.conv):
        kept.normal_()
    batch.lengths = [context - 1] * streams
    network = batch.call([1] * streams, known=False)
    return lambda: linear_argmax(network(), model.lm_head.weight)


def replayed(call: Callable[[], object]) -> Callable[[], None]:
    """The same call as a CUDA graph."""
    call()  # compiles what the graph holds
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        call()

    def replay() -> None:
        graph.replay()
        _ = call  # what the graph reads lives as long as the graph

    return replay


def weights_read(model: Qwen3NextForCausalLM, tokens: int) -> tuple[float, float]:
    """Bytes of the weights, embedding and head aside, that so many tokens read; and multiplications per token."""
    config, total, products = model.config, 0.0, 0.0
    share = config.num_experts_per_tok / config.num_experts
    for layer in model.model.layers:
        for name, weight in layer.named_parameters():
            hit, used = 1.0, 1.0
            if ".experts." in f".{name}":
                hit, used = 1 - (1 - share) ** tokens, share
            total += hit * weight.nbytes
            products += used * weight.numel() if weight.dim() > 1 else 0
    return total, products


def step_bytes(model: Qwen3NextForCausalLM, streams: int, context: int) -> float:
    """What a decode step must move, at least."""
    config = model.config
    types = [cast("DecoderLayer", layer).layer_type for layer in model.model.layers]
    of_state = PackedMemory.allocate(config, pages=1, slots=1, dtype=model.dtype, device="meta")
    states = 2 * (of_state.recurrent[0].nbytes + of_state.conv[0].nbytes) * types.count("linear_attention")
    keys = 2 * of_state.keys[0].nbytes / PAGE * context * types.count("full_attention")
    return weights_read(model, streams)[0] + streams * (states + keys) + model.lm_head.weight.nbytes


def prompt_flops(model: Qwen3NextForCausalLM, length: int) -> tuple[float, float]:
    """Of the products with weights, and of attention."""
    config = model.config
    layers = sum(layer.layer_type == "full_attention" for layer in model.model.layers)
    pairs = length * (length + 1) / 2
    return (
        2.0 * length * weights_read(model, length)[1],
        4.0 * pairs * config.num_attention_heads * config.head_dim * layers,
    )


def seconds(call: Callable[[], object], repeats: int) -> float:
    """The median of some calls, each between two events, after one that compiles."""
    call()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def kernels(call: Callable[[], object], most: int = 30) -> str:
    """A table of what ran on the device in one call, by time."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events() or ():
        if event.device_type == DeviceType.CUDA:
            times[event.name].append(event.device_time)
    total, count = sum(map(sum, times.values())), sum(map(len, times.values()))
    lines = [f"      {count} kernels, {count / LAYERS:.1f} a layer, {total / 1e3:.2f} ms"]
    for name, each in sorted(times.items(), key=lambda item: -sum(item[1]))[:most]:
        lines.append(f"      {sum(each) / 1e3:9.3f} ms {len(each):6} x {sum(each) / len(each):9.1f} us  {name[:90]}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

"""Prefill, decode and load speed of the model beside transformers' Qwen3-Next, in one run on one machine.

    python benchmarks/model.py [--device cpu|cuda] [--dtype bfloat16|float32] [--seconds N] [--json FILE]

Both packages compute with the same weights (the same memory) and with plain PyTorch kernels. transformers runs with the
fastest of its `experts_implementation`s, chosen anew for every row; runs of the two alternate and medians are compared.
Logits are compared first: where they differ, no speed is printed and the exit status is 1.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache
from transformers.models.qwen3_next import Qwen3NextConfig as PeerConfig
from transformers.models.qwen3_next import Qwen3NextForCausalLM as PeerModel

from qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest |ours - theirs| / |theirs| over all logits of a check."""

IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
GATHER_BYTES = 2 * 2**30
"""batched_mm copies the experts of every token; it is not tried where the copies would be larger than this."""

ROPE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A random model and the rows to measure.

    Attributes:
        config: fields of the configuration; the vocabulary is the published one unless given.
        prefill: numbers of prompt tokens.
        decode: (streams, context) pairs.
        steps: decoding steps per measurement.
        repeats: measurements of each package per row; their median counts.
        load: fields that make the checkpoint of the load row smaller.
    """

    config: dict[str, Any]
    prefill: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    steps: int = 8
    repeats: int = 3
    load: dict[str, Any] = field(default_factory=dict)


SHAPES_80B: dict[str, Any] = {
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
SHAPES_CPU: dict[str, Any] = SHAPES_80B | {
    "hidden_size": 1024,
    "head_dim": 128,
    "linear_num_key_heads": 8,
    "linear_num_value_heads": 16,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_hidden_layers": 4,
    "vocab_size": 32768,
}
SHAPES_TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
PRESETS = {
    "tiny": Preset(config=SHAPES_TINY, prefill=(5, 70), decode=((1, 6), (3, 6)), steps=2, repeats=2),
    "cpu": Preset(config=SHAPES_CPU, prefill=(512, 4096), decode=((1, 512), (8, 512))),
    "cpu-12-layers": Preset(
        config=SHAPES_CPU | {"num_hidden_layers": 12, "vocab_size": 151936},
        prefill=(512, 4096),
        decode=((1, 512), (8, 512), (1, 4096)),
    ),
    "80b-8-layers": Preset(
        config=SHAPES_80B | {"num_hidden_layers": 8},
        prefill=(512, 4096, 16384),
        decode=((1, 1024), (16, 1024)),
        steps=16,
        repeats=5,
        load={"num_hidden_layers": 2, "num_experts": 256, "layer_types": ["linear_attention", "full_attention"]},
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: tokens per second, or seconds, of both."""

    work: str
    unit: str
    ours: float
    theirs: float
    implementation: str

    @property
    def ratio(self) -> float:
        """How many times as fast as transformers."""
        return self.theirs / self.ours if self.unit == "s" else self.ours / self.theirs


@dataclass(frozen=True)
class Pair:
    """Both packages' models over the same weights."""

    ours: Qwen3NextForCausalLM
    theirs: PeerModel

    @property
    def device(self) -> torch.device:
        return self.ours.device

    def implementations(self, tokens: int) -> list[str]:
        """transformers' ways to compute the experts that exist and fit for so many tokens."""
        config = self.ours.config
        weights = 3 * config.moe_intermediate_size * config.hidden_size * self.ours.dtype.itemsize
        gathered = tokens * config.num_experts_per_tok * weights
        return [name for name in IMPLEMENTATIONS if name != "batched_mm" or gathered <= GATHER_BYTES]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    started = time.perf_counter()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=max(100, Console().width))
    preset = PRESETS[options.preset]
    dtype = getattr(torch, options.dtype)
    pair = make_pair(preset.config, torch.device(options.device), dtype)
    console.print(described(options, pair), highlight=False)
    error, bound = check(pair), BOUNDS[dtype]
    if not error <= bound:
        console.print(f"[red]The logits differ by {error:.1e}; at most {bound:.0e} is allowed. No speed is printed.")
        return 1
    console.print(f"logits agree: largest relative error {error:.1e}, at most {bound:.0e} allowed", highlight=False)
    rows, skipped = [], []
    for work, measure in measurements(preset, pair, options.scratch):
        if time.perf_counter() - started > options.seconds:
            skipped.append(work)
            continue
        rows.append(measure(work))
        print(line(rows[-1]), flush=True)
    console.print(table(rows))
    if skipped:
        console.print(f"[yellow]Not measured, {options.seconds:g} seconds were over: {', '.join(skipped)}")
    if options.json:
        record = {"machine": described(options, pair), "error": error, "skipped": skipped}
        options.json.write_text(json.dumps(record | {"rows": [asdict(r) | {"ratio": r.ratio} for r in rows]}, indent=1))
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: cpu, or 80b-8-layers on CUDA")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: float32 on a CPU without AVX-512")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no further row after so many seconds")
    parser.add_argument("--scratch", type=Path, help="where the checkpoint of the load row is written for a while")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args(arguments)
    options.preset = options.preset or {"cpu": "cpu", "cuda": "80b-8-layers"}[options.device]
    slow_bf16 = options.device == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    options.dtype = options.dtype or ("float32" if slow_bf16 else "bfloat16")
    return options


def described(options: argparse.Namespace, pair: Pair) -> str:
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    present = [p for p in ("fla", "causal_conv1d", "kernels") if importlib.util.find_spec(p)]
    kernels = "plain kernels" if not present else f"transformers may use {', '.join(present)}"
    size = sum(p.numel() for p in pair.ours.parameters()) / 1e9
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{options.preset}: {size:.3g} B parameters, {options.dtype}; {name}; {versions}, {kernels}"


@torch.no_grad()
def make_pair(fields: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Pair:
    """A random model of ours and transformers' model over the same parameters."""
    ours = random_model(fields, device, dtype)
    settings = {k: v for k, v in ours.config.to_dict().items() if k not in ("model_type", "dtype", "architectures")}
    with torch.device("meta"):
        theirs = PeerModel(PeerConfig(**settings))
    theirs.load_state_dict(ours.state_dict(), assign=True)
    rotary = theirs.model.rotary_emb
    theirs.model.rotary_emb = type(rotary)(rotary.config).to(device)
    return Pair(ours, theirs.eval())


@torch.no_grad()
def random_model(fields: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Qwen3NextForCausalLM:
    config = Qwen3NextConfig(**({"rope_parameters": ROPE, "num_nextn_predict_layers": 0} | fields))
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith(("A_log", "dt_bias")):
            parameter.data = torch.empty_like(parameter, dtype=torch.float32).uniform_(-3, 0, generator=generator)
        else:
            fill(parameter, spread(name, parameter), generator)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config).to(device)
    return model.eval()


def spread(name: str, parameter: torch.Tensor) -> float:
    """Embeddings that outweigh the first layers' updates and routers as decided as trained ones: otherwise a random
    network magnifies bf16 rounding, in either package, until the logits that are compared say nothing."""
    if name.endswith("embed_tokens.weight"):
        return 1.0
    if name.endswith("mlp.gate.weight"):
        return 5 / parameter.shape[-1] ** 0.5
    return 0.02 if parameter.dim() > 1 else 0.1


def fill(parameter: torch.Tensor, std: float, generator: torch.Generator) -> None:
    """Normal values; a CPU draws them slowly, so there a large tensor repeats a block of no round size."""
    flat, block = parameter.flatten(), 4_000_037
    drawn = flat[:block] if parameter.device.type == "cpu" else flat
    drawn.normal_(0, std, generator=generator)
    for start in range(drawn.numel(), flat.numel(), block):
        rest = flat[start : start + block]
        rest.copy_(drawn[: rest.numel()])


@torch.no_grad()
def check(pair: Pair) -> float:
    """The relative error of our logits over a prompt and one cached step."""
    vocabulary = pair.ours.config.vocab_size
    tokens = torch.randint(vocabulary, (2, 100), generator=torch.Generator().manual_seed(1)).to(pair.device)
    ours, theirs = (logits_of(model, tokens) for model in (pair.ours, pair.theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


def logits_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    prompt = model(tokens[:, :-1], use_cache=True)
    step = model(tokens[:, -1:], past_key_values=prompt.past_key_values)
    return torch.cat([prompt.logits, step.logits], dim=1).float()


def measurements(preset: Preset, pair: Pair, scratch: Path | None) -> Iterator[tuple[str, Callable[[str], Row]]]:
    for length in preset.prefill:
        yield f"prefill {length:,} tokens", lambda work, n=length: prefill(work, pair, preset, n)
    for streams, context in preset.decode:
        work = f"decode {streams} stream{'s' if streams > 1 else ''}, context {context:,}"
        yield work, lambda work, s=streams, c=context: decode(work, pair, preset, s, c)
    yield "load a checkpoint", lambda work: load(work, pair, preset, scratch)


@torch.no_grad()
def prefill(work: str, pair: Pair, preset: Preset, length: int) -> Row:
    tokens = torch.randint(pair.ours.config.vocab_size, (1, length), device=pair.device)

    def run(model: Any) -> float:
        return seconds(lambda: model(tokens, use_cache=True, logits_to_keep=1), pair.device)

    best = fastest(pair, length, lambda: run(pair.theirs))
    run(pair.ours)
    ours, theirs = alternate(preset.repeats, lambda: run(pair.ours), lambda: run(pair.theirs))
    return Row(work=work, unit="tokens/s", ours=length / ours, theirs=length / theirs, implementation=best)


@torch.no_grad()
def decode(work: str, pair: Pair, preset: Preset, streams: int, context: int) -> Row:
    """Greedy steps over a cache that a prompt of `context` tokens has filled."""
    pair.theirs.set_experts_implementation(IMPLEMENTATIONS[0])  # the one of the row before may not fit the prompt
    ours, theirs = (Stream(model, streams, context) for model in (pair.ours, pair.theirs))
    best = fastest(pair, streams, theirs.step)
    theirs.step()
    for _ in range(2):
        ours.step()
    times = alternate(preset.repeats * preset.steps, ours.step, theirs.step)
    speeds = [streams / t for t in times]
    return Row(work=work, unit="tokens/s", ours=speeds[0], theirs=speeds[1], implementation=best)


class Stream:
    """Sequences that are being decoded together."""

    def __init__(self, model: Any, streams: int, context: int) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)
        tokens = torch.randint(model.config.vocab_size, (streams, context), device=model.device)
        self.tokens = self._next(tokens)

    def step(self) -> float:
        """Seconds of one step."""

        def advance() -> None:
            self.tokens = self._next(self.tokens)

        return seconds(advance, self.model.device)

    def _next(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1:].argmax(-1)


def fastest(pair: Pair, tokens: int, run: Callable[[], float]) -> str:
    """Set transformers to the implementation with the smallest of two times, the first run warming up."""
    times = {}
    for name in pair.implementations(tokens):
        pair.theirs.set_experts_implementation(name)
        first = run()
        times[name] = first if first > 1 else min(first, run())  # what takes long needs no warming up
    best = min(times, key=times.__getitem__)
    pair.theirs.set_experts_implementation(best)
    return best


def alternate(repeats: int, ours: Callable[[], float], theirs: Callable[[], float]) -> tuple[float, float]:
    """Medians of both, taken in turn so that what else the machine does meets both alike."""
    times = [(ours(), theirs()) for _ in range(repeats)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


@torch.no_grad()
def load(work: str, pair: Pair, preset: Preset, scratch: Path | None) -> Row:
    """Read a published checkpoint into a model on the device. Both read it from the page cache, once before timing."""
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        model = random_model(preset.config | preset.load, pair.device, pair.ours.dtype)
        model.save_pretrained(directory)
        gigabytes = sum(file.stat().st_size for file in Path(directory).glob("*.safetensors")) / 1e9
        del model
        options = {"dtype": pair.ours.dtype, "device_map": pair.device}

        def run(kind: Any) -> float:
            return seconds(lambda: kind.from_pretrained(directory, **options), pair.device)

        ours, theirs = alternate(2, lambda: run(Qwen3NextForCausalLM), lambda: run(PeerModel))
    return Row(work=f"{work}, {gigabytes:.3g} GB", unit="s", ours=ours, theirs=theirs, implementation="-")


def seconds(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def line(row: Row) -> str:
    theirs = f"transformers {row.theirs:.3g} ({row.implementation})"
    return f"{row.work}: {row.ours:.3g} {row.unit}, {theirs}: {row.ratio:.2f} x"


def table(rows: list[Row]) -> Table:
    result = Table("work", "unit", "qwen3-next", "transformers", "its experts", "times as fast")
    for row in rows:
        style = None if row.ratio >= 1 else "red"
        cells = f"{row.ours:,.3g}", f"{row.theirs:,.3g}", row.implementation, f"{row.ratio:.2f}"
        result.add_row(row.work, row.unit, *cells, style=style)
    return result


if __name__ == "__main__":
    sys.exit(main())

"""How fast a model for inference is loaded, beside a plain read of the same files, and what it takes of the host.

    python -m benchmarks.loading [--device cpu|cuda] [--shapes small|80b] [--layers N] [--cold] [--json FILE]

Random checkpoints in the published layout, bf16 and block-fp8 with bf16 and fp32 scales, are written to a temporary
folder one after the other (TMPDIR chooses the disk) and loaded as they are, quantised, and dequantised, each in a fresh
process. "plain" reads the same files with as many threads: for a CPU into new memory of their size, for a GPU into a
little that is used again and again. "host" is how much the process grew at most while it loaded, beside the size of the
model. Files are read from the page cache, if it holds
them; `--cold` drops them from it before each reading, and then it is the disk that is measured. Some values are
compared with those of the files: where one differs, nothing more is printed and the exit status is 1.

On a GPU: `python -m benchmarks.loading --device cuda --layers 4` (the published shapes, files of up to 15 GB, as much
GPU memory, and twice that of the host so that the page cache holds them), and once more with `--cold`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from benchmarks.model import ROPE, SHAPES_80B, SHAPES_CPU
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen3_next import Qwen3NextConfig
from qwen3_next.engine.loading import read_config
from qwen3_next.model.bare import BareCausalLM
from qwen3_next.model.quantize import QUANTIZED
from qwen3_next.model.weights import published_shapes, published_tensors
from qwen3_next.ops.quant import block_scale_shape, dequantize_block_fp8, quantize_block_fp8

SHAPES: dict[str, dict[str, Any]] = {
    "small": SHAPES_CPU | {"num_experts": 64},
    "80b": SHAPES_80B | {"vocab_size": 151936},
}
SCALES = {"bf16": None, "fp8, bf16 scales": torch.bfloat16, "fp8, fp32 scales": torch.float32}
"""What is written, and the dtype of its scales."""

REPEATS = 3
READERS, RUN_BYTES, READ_BYTES = 8, 2**25, 2**20
CHECKED = (
    "embed_tokens.weight",
    "layers.0.mlp.experts.1.up_proj.weight",
    "layers.0.mlp.gate.weight",
    "layers.0.linear_attn.out_proj.weight",
)
"""Ends of the names of the tensors that are compared."""

SCALE = "_scale_inv"
RED = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to load one checkpoint; seconds are the best of some, bytes those of files, model and host."""

    files: str
    quantization: Literal["auto", "fp8", "none"]
    is_right: bool
    file_bytes: int
    model_bytes: int
    host_bytes: int
    seconds: float
    plain_seconds: float

    def __str__(self) -> str:
        """One line of the report."""
        ours, plain = (self.file_bytes / each / 1e9 for each in (self.seconds, self.plain_seconds))
        return (
            f"{self.files:17} {self.quantization:5} {self.file_bytes / 1e9:7.2f} GB {self.seconds:7.2f} s "
            f"{ours:6.2f} GB/s   plain {plain:6.2f} GB/s   {self.seconds / self.plain_seconds:5.2f} x   "
            f"model {self.model_bytes / 1e9:6.2f} GB   host {self.host_bytes / 1e9:6.2f} GB"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 0, or 1 where what was loaded is not what the files hold."""
    options = parse(arguments)
    shapes = options.shapes or ("80b" if options.device.startswith("cuda") else "small")
    out, rows = Console(highlight=False, markup=False, width=160), list[Row]()
    for files, scales in SCALES.items():
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), SHAPES[shapes] | {"num_hidden_layers": options.layers}, scales)
            for quantization in ("auto", "fp8") if scales is None else ("auto", "none"):
                row = measured(Path(folder), files, quantization, options.device, options.cold)
                if not row.is_right:
                    Console(stderr=True).print(f"{files}, {quantization}: other values than in the files; no speed.")
                    return RED
                out.print(str(row))
                rows.append(row)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="small on a CPU and 80b on a GPU, unless given")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure there")
    return parser.parse_args(arguments)


def write(folder: Path, settings: dict[str, Any], scales: torch.dtype | None) -> None:
    """A random checkpoint in the published layout, a file for each layer and one for the rest."""
    config = Qwen3NextConfig(**settings, rope_parameters=ROPE, num_nextn_predict_layers=0, dtype=torch.bfloat16)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = published_shapes(BareCausalLM(config).state_dict())
    values = torch.randn(2**22)
    pools = {dtype: values.mul(50).to(dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)}
    shards: dict[str, dict[str, Tensor]] = {}
    for name, shape in shapes.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shard = shards.setdefault(f"model-{layer}.safetensors", {})
        is_fp8 = scales is not None and name.split(".")[-2] in QUANTIZED
        shard[name] = taken(pools[torch.float8_e4m3fn if is_fp8 else torch.bfloat16], shape)
        if is_fp8:
            shard[f"{name}_scale_inv"] = torch.rand(block_scale_shape(shape)).to(scales)
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def taken(pool: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Values from a random place of the pool on, which is as long as it has to be."""
    count, start = prod(shape), int(torch.randint(len(pool), ()))
    return pool.repeat(-(-(start + count) // len(pool)))[start : start + count].view(shape).clone()


def measured(folder: Path, files: str, quantization: Any, device: str, cold: bool) -> Row:
    """In a process of its own, whose memory nothing has used before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(measure, folder, files, quantization, torch.device(device), cold).result()


def measure(folder: Path, files: str, quantization: Any, device: torch.device, cold: bool) -> Row:
    torch.zeros(1, device=device)
    before, config = peak(), read_config(folder)

    def load() -> BareCausalLM:
        model = BareCausalLM.from_directory(folder, config, torch.bfloat16, device, quantization=quantization)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return model

    model = load()
    grown = peak() - before
    right, size = check(model, folder), sum(each.nbytes for each in model.state_dict().values())
    del model
    weights = sorted(folder.glob("*.safetensors"))
    evicted = weights if cold else []
    return Row(
        files=files,
        quantization=quantization,
        is_right=right,
        file_bytes=sum(file.stat().st_size for file in weights),
        model_bytes=size,
        host_bytes=grown,
        seconds=seconds(load, evicted) if right else 0.0,
        plain_seconds=seconds(lambda: plain_read(weights, is_kept=device.type == "cpu"), evicted) if right else 0.0,
    )


def check(model: BareCausalLM, folder: Path) -> bool:
    """Whether some weights are, bit by bit, what the files hold, or what that is in fp8 or in bf16."""
    state = model.state_dict()
    weights = dict(published_tensors({name: each for name, each in state.items() if not name.endswith(SCALE)}))
    scales = {name.removesuffix(SCALE): each for name, each in state.items() if name.endswith(SCALE)}
    scales = dict(published_tensors(scales))
    chosen = [name for name in weights if name.endswith(CHECKED)]
    return len(chosen) >= len(CHECKED) and all(
        is_right(weights[name], scales.get(name), *stored(folder, name, weights[name].device)) for name in chosen
    )


def stored(folder: Path, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """A weight and its scales by another reader than the one that is measured."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    with safe_open(folder / weight_map[name], "pt") as file:
        scales = file.get_tensor(name + SCALE).to(device) if name + SCALE in weight_map else None
        return file.get_tensor(name).to(device), scales


def is_right(weight: Tensor, scales: Tensor | None, values: Tensor, factors: Tensor | None) -> bool:
    if scales is None and factors is not None:
        values = dequantize_block_fp8(values, factors, weight.dtype)
    elif scales is not None:
        values, factors = quantize_block_fp8(values) if factors is None else (values, factors)
        if not torch.equal(scales, factors.float()):
            return False
    return weight.dtype == values.dtype and torch.equal(weight.view(torch.uint8), values.view(torch.uint8))


def seconds(call: Callable[[], object], evicted: Sequence[Path]) -> float:
    """The best of some calls; before each of them the files to evict leave the page cache."""
    times: list[float] = []
    for _ in range(REPEATS):
        for file in evicted:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())  # what is not on the disk yet stays
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def plain_read(files: Sequence[Path], is_kept: bool) -> None:
    """Read all bytes of some files by several threads, into new memory of their size or into little."""
    runs = [(file, start) for file in files for start in range(0, file.stat().st_size, RUN_BYTES)]

    def read(share: Sequence[tuple[Path, int]]) -> Any:
        memory = np.empty((len(share) if is_kept else 1, RUN_BYTES if is_kept else READ_BYTES), np.uint8)
        for number, (file, start) in enumerate(share):
            target = memory[number if is_kept else 0].data
            with file.open("rb", buffering=0) as handle:
                handle.seek(start)
                for at in range(0, RUN_BYTES, READ_BYTES):
                    handle.readinto(target[at : at + READ_BYTES] if is_kept else target)
        return memory

    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(read, (runs[reader::READERS] for reader in range(READERS))))


def peak() -> int:
    """The most memory that this process has held."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    sys.exit(main())

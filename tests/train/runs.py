"""Training runs small enough for a test, what they leave behind, and processes of their own to run and kill them in."""

import multiprocessing
import os
import random
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from qwen3_next.train import TrainConfig, train
from qwen3_next.train.log import read_rows
from qwen3_next.train.tokens import DOCUMENTS, META, TOKENS

VOCABULARY = 61

MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "max_position_embeddings": 64,
}


def write_store(folder: Path, documents: Sequence[Sequence[int]], **meta: Any) -> Path:
    """A tokenised directory."""
    folder.mkdir(parents=True)
    np.concatenate([np.asarray(d) for d in documents]).astype("<u2").tofile(folder / TOKENS)
    np.cumsum([0, *map(len, documents)]).astype("<i8").tofile(folder / DOCUMENTS)
    (folder / META).write_text(str({"dtype": "uint16"} | meta).replace("'", '"'), encoding="utf-8")
    return folder


def random_documents(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths]


def settings(folder: Path, **changes: dict[str, Any]) -> dict[str, Any]:
    """A run of 6 short steps in `folder`, on documents that are written there when it is first asked for.

    `changes` are merged into the tables of these names.
    """
    data = folder / "data"
    if not data.exists():
        lengths = [1 + seed * 7 % 40 for seed in range(30)]
        write_store(data / "train", random_documents(1, lengths))
        write_store(data / "held_out", random_documents(2, [20, 5, 31]), bytes=200)
    tables: dict[str, Any] = {
        "model": {"config": MODEL},
        "data": {
            "train": [str(data / "train")],
            "validation": {"held_out": str(data / "held_out")},
            "sequence_length": 24,
            "tokens_per_batch": 40,
        },
        "optimizer": {"lr": 1e-2},
        "schedule": {"steps": 6, "warmup_steps": 2},
        "run": {
            "output": str(folder / "run"),
            "device": "cpu",
            "seed": 5,
            "accumulate": 2,
            "log_every": 4,
            "validate_every": 3,
            "checkpoint_every": 2,
        },
    }
    return tables | {name: tables.get(name, {}) | table for name, table in changes.items()}


def run(folder: Path, **changes: dict[str, Any]) -> Path:
    """Train and return the output directory."""
    config = TrainConfig.from_dict(settings(folder, **changes))
    train(config)
    return Path(config.run.output)


def results(output: Path) -> dict[str, Any]:
    """All that a run leaves and that does not measure time: the newest checkpoint, the exported model, the log."""
    newest = sorted((output / "checkpoints").glob("step-*"))[-1]
    exported = {path.name: path.read_bytes() for path in sorted((output / "model").iterdir())}
    rows = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_rows(output)]
    return {"state": load_file(newest / "state.safetensors"), "model": exported, "rows": rows, "step": newest.name}


def assert_same_results(one: Path, other: Path) -> None:
    """Weights, moments, exported files and logged figures agree to the bit."""
    a, b = results(one), results(other)
    assert a["step"] == b["step"]
    assert a["rows"] == b["rows"]
    assert a["model"] == b["model"]
    assert a["state"].keys() == b["state"].keys()
    for name, tensor in a["state"].items():
        assert torch.equal(tensor, b["state"][name]), name


def forkserver() -> ForkServerContext:
    """The start method "forkserver", whose processes have the package imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["qwen3_next.train.trainer", "torch.utils.tensorboard"])
    return context


def in_process(work: Callable[..., None], *arguments: Any) -> int:
    """Run `work` in a process of its own and return its exit code."""
    process = forkserver().Process(target=_with_threads, args=(torch.get_num_threads(), work, *arguments))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def _with_threads(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """As many threads as the test has, because their number decides the order of sums."""
    torch.set_num_threads(count)
    work(*arguments)


def train_and_die(tables: dict[str, Any], folder: str, file_operations: int) -> None:
    """Train, and die by SIGKILL at the n-th time that a file below `folder` is opened, renamed, made or removed."""
    left = file_operations

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        watched = event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
        if watched and str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    train(TrainConfig.from_dict(tables))


def train_on_small_disk(tables: dict[str, Any], limit: int, report: str) -> None:
    """Train where no file may grow beyond `limit` bytes, and write down which error ends it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train(TrainConfig.from_dict(tables))
    except Exception as error:
        Path(report).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")

"""Checkpoints that a kill at any moment cannot damage, and that continue to the bit."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen3_next.errors import CheckpointError, StorageError
from qwen3_next.train.data import Cursor

_STATE, _NOTES, _PREFIX = "state.safetensors", "state.json", "step-"


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: optimiser steps done.
        tokens: tokens seen.
        seconds: time spent training.
        cursor: the next token to read.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cursor: Cursor = Cursor()


@dataclass(frozen=True, eq=False)
class Saved:
    """What a checkpoint holds: where the run stood, its settings, and the optimiser's and generators' tensors."""

    progress: Progress
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def save_checkpoint(
    directory: Path,
    progress: Progress,
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    export: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write `step-<n>` beside earlier checkpoints and drop all but the newest `keep`.

    It is written under another name, flushed to the disk and renamed last, so that a checkpoint is either whole or not
    there.

    Args:
        export: writes the model itself into the directory it is given.

    Raises:
        StorageError: it could not be written; earlier checkpoints are as they were.
    """
    target = directory / f"{_PREFIX}{progress.step:08d}"
    partial = directory / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        export(partial / "model")
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, partial / _STATE)
        notes = {"progress": asdict(progress), "settings": dict(settings)}
        (partial / _NOTES).write_text(json.dumps(notes, indent=2), encoding="utf-8")
        _flush(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
        _flush_entry(directory)
    except (OSError, SafetensorError, CheckpointError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"cannot write the checkpoint {target}: {error}. Earlier checkpoints are whole; free some space and run the "
            "same command again to continue."
        ) from error
    for old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_latest(directory: Path) -> Saved | None:
    """The newest checkpoint of a run; None where there is none.

    Raises:
        CheckpointError: the newest checkpoint cannot be read.
    """
    found = _checkpoints(directory)
    if not found:
        return None
    try:
        notes = json.loads((found[-1] / _NOTES).read_text(encoding="utf-8"))
        with safe_open(found[-1] / _STATE, framework="pt") as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {found[-1]}: {error}. Remove that directory to continue from the one before."
        ) from error
    position = notes["progress"]
    progress = Progress(**(position | {"cursor": Cursor(**position["cursor"])}))
    return Saved(progress, notes["settings"], tensors)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's random generators."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the random generators back to where `generator_states` found them."""
    torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob(f"{_PREFIX}*"))


def _flush(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
    for path in (*[p for p in directory.rglob("*") if p.is_dir()], directory):
        _flush_entry(path)


def _flush_entry(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

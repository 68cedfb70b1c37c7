"""Checkpoints that a kill at any moment cannot damage, and that continue to the bit."""

import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen3_next.errors import CheckpointError, ConfigError, StorageError
from qwen3_next.train.config import TrainConfig
from qwen3_next.train.data import Cursor
from qwen3_next.train.storage import is_full

_MODEL, _STATE, _NOTES, _PREFIX = "model", "state.safetensors", "state.json", "step-"
_FURTHER, _FILE_BYTES = "state-*.safetensors", 4_000_000_000
_START = Cursor()


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
    cursor: Cursor = _START


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same: what `same_run_settings` says of the settings, and the documents' checksums."""

    settings: Mapping[str, Any]
    documents: Sequence[str]


@dataclass(frozen=True, eq=False)
class Saved:
    """What a checkpoint holds: where the run stood, what it was, and the tensors that the model is not made of.

    Attributes:
        model: directory of the model in the published layout.
        tensors: the optimiser's, the generators' and the log's, each read when it is asked for.
    """

    progress: Progress
    identity: Identity
    model: Path
    tensors: Mapping[str, Tensor]


def same_run_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that a resumed run must share with the run it continues, by their dotted names.

    They are all that decide what a step computes: the tables model, optimizer and loss, and of data and run what cuts
    and orders the tokens (sequence_length, tokens_per_batch, seed, accumulate) and the dtype. The documents must be the
    same too, which their checksums tell whatever the files are called. Free to change are the schedule (a run may be
    made longer; the new one holds from the next step on), the validation sets, and everything that says where to
    compute and how often to save, log or validate.
    """
    settings = config.as_dict()
    kept = {table: settings[table] for table in ("model", "optimizer", "loss")}
    kept["data"] = {key: settings["data"][key] for key in ("sequence_length", "tokens_per_batch")}
    kept["run"] = {key: settings["run"][key] for key in ("seed", "dtype", "accumulate")}
    return json.loads(json.dumps(dict(flattened(kept))))


def refuse_other_settings(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Compare with the settings that a run was started with.

    Raises:
        ConfigError: names the first that differs.
    """
    mine = same_run_settings(config)
    for name in sorted(mine.keys() | saved.keys()):
        if mine.get(name) != saved.get(name):
            raise ConfigError(
                f"{name}={mine.get(name)!r}, but the run in {config.run.output} was started with {saved.get(name)!r}; "
                "restore it, or choose another run.output."
            )


def refuse_other_documents(saved: Sequence[str], mine: Sequence[str], config: TrainConfig) -> None:
    """Compare with the checksums of the documents that a run was started with.

    Raises:
        ConfigError: they are others, or in another order; or tokenised otherwise.
    """
    if list(saved) != list(mine):
        raise ConfigError(
            f"data.train={list(config.data.train)!r} with data.tokenizer={config.data.tokenizer!r} are not the tokens "
            f"that the run in {config.run.output} was started with; restore files and tokenizer, or choose another "
            "run.output."
        )


def flattened(table: Mapping[str, Any], where: str = "") -> Generator[tuple[str, Any]]:
    """Nested settings by their dotted names."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flattened(cast("dict[str, Any]", value), f"{where}{key}.")
        else:
            yield f"{where}{key}", value


@contextmanager
def storage_errors(target: Path) -> Generator[None]:
    """Turn what a disk or a directory refuses into a `StorageError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointError) as error:
        remedy = "free some space" if is_full(error) else f"make {target} writable, with nothing else in its place,"
        raise StorageError(
            f"cannot write {target}: {error}. Checkpoints written before are whole; {remedy} and run the same "
            "command again to continue from the last one."
        ) from error


def save_checkpoint(
    directory: Path,
    progress: Progress,
    identity: Identity,
    tensors: Mapping[str, Tensor],
    export: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write `step-<n>` beside earlier checkpoints and drop all but the newest `keep`; nothing where it exists.

    It is written under another name, flushed to the disk and renamed last, so that a checkpoint is either whole or not
    there.

    Args:
        export: writes the model itself into the directory it is given.

    Raises:
        StorageError: it could not be written; earlier checkpoints are as they were.
    """
    target = directory / f"{_PREFIX}{progress.step:08d}"
    if target.exists():
        return target
    _remove_partial(directory)
    try:
        with storage_errors(target):
            partial = _partial(target)
            partial.mkdir(parents=True)
            export(partial / _MODEL)
            _write_state(partial, tensors)
            notes = {"progress": asdict(progress), "identity": asdict(identity)}
            (partial / _NOTES).write_text(json.dumps(notes, indent=2), encoding="utf-8")
            _flush(partial)
            partial.replace(target)
            _flush_entry(directory)
            for old in _checkpoints(directory)[:-keep]:
                old.replace(_partial(old))  # a kill in the middle of a removal must not leave half a checkpoint
    finally:
        _remove_partial(directory)
    return target


def load_latest(directory: Path) -> Saved | None:
    """The newest checkpoint of a run; None where there is none.

    Raises:
        CheckpointError: the newest checkpoint cannot be read.
    """
    found = _checkpoints(directory)
    if not found:
        return None
    newest = found[-1]
    try:
        notes = json.loads((newest / _NOTES).read_text(encoding="utf-8"))
        tensors = StoredState(newest)
        position = notes["progress"]
        progress = Progress(**(position | {"cursor": Cursor(**position["cursor"])}))
        return Saved(progress, Identity(**notes["identity"]), newest / _MODEL, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {newest}: {error}. Remove that directory to continue from the one before."
        ) from error


class StoredState(Mapping[str, Tensor]):
    """The tensors of a checkpoint's state files by name; none is held after it was asked for."""

    def __init__(self, directory: Path) -> None:
        handles = [safe_open(path, framework="pt") for path in (directory / _STATE, *sorted(directory.glob(_FURTHER)))]
        self._of = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118  not a mapping

    def __getitem__(self, name: str) -> Tensor:
        return self._of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)


def _write_state(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """One file, or several where one would take more memory than `_FILE_BYTES` and one tensor."""
    files, held, size = 0, dict[str, Tensor](), 0
    for place, (name, tensor) in enumerate(tensors.items(), start=1):
        held[name] = tensor.detach().cpu().contiguous()
        size += held[name].nbytes
        if size >= _FILE_BYTES or place == len(tensors):
            save_file(held, directory / (_FURTHER.replace("*", f"{files:05d}") if files else _STATE))
            files, held, size = files + 1, {}, 0


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
    found = [path for path in directory.glob(f"{_PREFIX}*") if re.fullmatch(rf"{_PREFIX}\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix(_PREFIX)))


def _partial(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _remove_partial(directory: Path) -> None:
    for path in directory.glob(f".{_PREFIX}*.partial"):
        shutil.rmtree(path, ignore_errors=True)


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

"""Checkpoints are whole or not there, whatever fails while they are written."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.train.runs import assert_same_results, in_process, run, settings, train_on_small_disk

from qwen3_next.errors import CheckpointError, StorageError
from qwen3_next.train.checkpoint import Identity, Progress, load_latest, save_checkpoint
from qwen3_next.train.data import Cursor

IDENTITY = Identity({"run.seed": 3}, ["abc"])


def save(directory: Path, step: int, export: Callable[[Path], None] | None = None, keep: int = 2) -> Path:
    def write(model: Path) -> None:
        model.mkdir()
        (model / "config.json").write_text(f"{step}")

    progress = Progress(step=step, tokens=9 * step, seconds=0.5, cursor=Cursor(1, 2, 3))
    tensors = {"weight": torch.full((3, 2), step).t(), "count": torch.tensor(step)}
    return save_checkpoint(directory, progress, IDENTITY, tensors, export or write, keep)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    path = save(tmp_path, 4)
    saved = load_latest(tmp_path)
    assert saved is not None
    assert saved.progress == Progress(step=4, tokens=36, seconds=0.5, cursor=Cursor(1, 2, 3))
    assert saved.identity == IDENTITY
    assert saved.model == path / "model"
    assert torch.equal(saved.tensors["weight"], torch.full((2, 3), 4))


def test_the_newest_are_kept_and_nothing_else_is_left(tmp_path: Path) -> None:
    for step in (1, 2, 30, 200):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000200"]
    saved = load_latest(tmp_path)
    assert saved is not None
    assert saved.progress.step == 200


def test_a_checkpoint_that_exists_is_not_written_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)

    def fail(model: Path) -> None:
        raise AssertionError

    save(tmp_path, 1, fail)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), CheckpointError("no space (os error 28)")])
def test_a_failure_while_exporting_leaves_earlier_checkpoints_alone(tmp_path: Path, error: Exception) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)

    def fail(model: Path) -> None:
        model.mkdir()
        (model / "part").write_text("x")
        raise error

    with pytest.raises(StorageError, match=r"cannot write .*step-00000002: .*o space.*free some space"):
        save(tmp_path, 2, fail)
    assert contents(tmp_path) == before


def test_a_failure_at_the_last_moment_leaves_earlier_checkpoints_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:

        def fail(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", fail)
        with pytest.raises(StorageError):
            save(tmp_path, 2)
    assert contents(tmp_path) == before


def test_the_newest_checkpoint_is_the_highest_number_and_what_only_looks_like_one_is_left_alone(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    (tmp_path / "step-backup").mkdir()
    found = load_latest(tmp_path)
    assert found is not None
    assert found.progress.step == 100_000_000
    save(tmp_path, 100_000_001, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step-100000001", "step-backup"}


@pytest.mark.parametrize(
    ("number", "frees_space"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EFBIG, True), (errno.EACCES, False)]
)
def test_only_a_full_disk_asks_for_space(tmp_path: Path, number: int, frees_space: bool) -> None:
    def refuse(_: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(StorageError) as caught:
        save(tmp_path, 1, refuse)
    assert ("free some space" in str(caught.value)) == frees_space
    assert ("writable" in str(caught.value)) != frees_space


def test_a_newest_checkpoint_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for name, content in (("state.json", "{}"), ("state.json", "{"), ("state.safetensors", "x")):
        whole = (path / name).read_bytes()
        (path / name).write_text(content)
        with pytest.raises(CheckpointError, match=r"step-00000001: .*continue from the one before"):
            load_latest(tmp_path)
        (path / name).write_bytes(whole)
    assert load_latest(tmp_path) is not None


@pytest.mark.parametrize(
    ("too_large", "named"),
    [
        ("log.jsonl", "log.jsonl"),
        ("checkpoints/step-00000001/model/model.safetensors", "step-00000002"),
        ("checkpoints/step-00000001/state.safetensors", "step-00000002"),
    ],
)
def test_a_full_disk_stops_the_run_with_the_last_checkpoint_intact(
    tmp_path: Path, uninterrupted: Path, too_large: str, named: str
) -> None:
    output = run(tmp_path, run={"max_seconds": 1e-9})
    before = contents(output / "checkpoints")
    limit = (output / too_large).stat().st_size - (0 if named == too_large else 1)
    assert in_process(train_on_small_disk, settings(tmp_path), limit, f"{tmp_path}/report") == 0
    report = (tmp_path / "report").read_text()
    assert report.startswith("StorageError: cannot write"), report
    assert named in report
    assert contents(output / "checkpoints") == before
    assert_same_results(run(tmp_path), uninterrupted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("uninterrupted"))

"""What a run says, and what is left of it when the run goes on from an earlier step."""

import json
import resource
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.train.runs import in_process

from qwen3_next.errors import StorageError
from qwen3_next.train.log import RunLog, plot_losses, read_rows


def write(directory: Path, from_step: int, steps: range) -> None:
    with RunLog(directory, from_step) as log:
        log.note("start" if from_step == 0 else "resume", {"from": from_step})
        for step in steps:
            log.row(step, {"loss/lm": 1.0 / step, "tokens": 10 * step})


def test_rows_go_to_json_lines_and_tensorboard(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 4))
    assert read_rows(tmp_path) == [{"step": s, "loss/lm": 1 / s, "tokens": 10 * s} for s in (1, 2, 3)]
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/lm")
    assert [(event.step, round(event.value, 6)) for event in scalars] == [(1, 1.0), (2, 0.5), (3, 0.333333)]


def test_rows_after_the_step_to_continue_from_are_dropped_and_half_a_line_too(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss')
    time.sleep(1.1)  # TensorBoard orders the files of a run by the second in their names
    write(tmp_path, 3, range(4, 5))
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]
    events = [json.loads(line).get("event") for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [event for event in events if event] == ["start", "resume"]
    scalars = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss/lm")
    assert [event.step for event in scalars] == [1, 2, 3, 4]


def test_a_run_that_begins_anew_begins_an_empty_log(tmp_path: Path) -> None:
    write(tmp_path, 0, range(1, 6))
    write(tmp_path, 0, range(1, 2))
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"event": "start", "from": 0},
        {"step": 1, "loss/lm": 1.0, "tokens": 10},
    ]


def test_an_output_that_is_no_directory_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"log\.jsonl"):
        RunLog(tmp_path / "file", 0)


def test_the_plot_shows_losses_and_validation_over_tokens(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0) as log:
        log.row(1, {"tokens": 10, "loss/lm": 2.0, "validation/a/lm": 3.0, "validation/a/lm_per_byte": 1.0})
    path = plot_losses(tmp_path)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match=r"loss\.png"):
        plot_losses(tmp_path)


def log_on_small_disk(directory: str) -> None:
    with RunLog(Path(directory), 0) as log:
        log.row(1, {"tokens": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        try:
            for step in range(2, 500):
                log.row(step, {"tokens": step})
        except StorageError as error:
            (Path(directory) / "report").write_text(str(error))
            raise SystemExit(7) from error


def test_a_full_disk_is_a_storage_error_and_keeps_the_rows_before(tmp_path: Path) -> None:
    assert in_process(log_on_small_disk, str(tmp_path)) == 7
    assert "free some space" in (tmp_path / "report").read_text()
    assert [row["step"] for row in read_rows(tmp_path)][:2] == [1, 2]

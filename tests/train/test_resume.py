"""Resumed = uninterrupted, to the bit, whatever ended the first part."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.train.runs import (
    assert_same_results,
    in_process,
    random_documents,
    results,
    run,
    settings,
    train_and_die,
    write_store,
)

from qwen3_next import ConfigError
from qwen3_next.train import TrainConfig, train, trainer
from qwen3_next.train.schedule import lr_factor


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("uninterrupted"))


def test_stopped_by_the_clock_after_every_step_and_resumed_equals_uninterrupted(
    tmp_path: Path, uninterrupted: Path
) -> None:
    config = TrainConfig.from_dict(settings(tmp_path, run={"max_seconds": 1e-9}))
    steps: list[int] = []
    finished = False
    while not finished:
        result = train(config)
        steps.append(result.step)
        finished = result.finished
        assert result.reason == ("finished" if finished else "time limit")
    assert steps == [1, 2, 3, 4, 5, 6]
    assert_same_results(Path(config.run.output), uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint_that_resumes_exactly(
    tmp_path: Path, uninterrupted: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.from_dict(settings(tmp_path))
    with monkeypatch.context() as patch:
        validate = trainer.validate

        def interrupted(*arguments: Any) -> dict[str, float]:
            os.kill(os.getpid(), number)
            return validate(*arguments)

        patch.setattr(trainer, "validate", interrupted)
        result = train(config)
    assert (result.reason, result.step) == ("signal", 3)
    assert (result.model / "model.safetensors").is_file()
    assert train(config).finished
    assert_same_results(Path(config.run.output), uninterrupted)


def test_a_signal_after_the_time_limit_is_still_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return lr_factor(*arguments)

    monkeypatch.setattr(trainer, "lr_factor", interrupted)
    assert train(TrainConfig.from_dict(settings(tmp_path, run={"max_seconds": 1e-9}))).reason == "signal"


def test_killed_at_random_moments_and_resumed_equals_uninterrupted(
    tmp_path: Path, uninterrupted: Path, fresh_seed: int
) -> None:
    draw = random.Random(fresh_seed)
    tables = settings(tmp_path)
    for _ in range(3):
        code = in_process(train_and_die, tables, f"{tmp_path}/run", draw.randint(1, 100))
        assert code in (0, -signal.SIGKILL)
    train(TrainConfig.from_dict(tables))
    assert_same_results(tmp_path / "run", uninterrupted)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    output = run(tmp_path)
    before = results(output)
    run(tmp_path)
    assert results(output)["rows"] == before["rows"]
    assert results(output)["model"] == before["model"]


def test_a_schedule_that_ends_before_the_steps_done_is_refused(uninterrupted: Path) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.steps=5.* has done 6"):
        run(uninterrupted.parent, schedule={"steps": 5})


def test_a_longer_schedule_continues_a_finished_run(tmp_path: Path) -> None:
    stable = {"kind": "wsd", "decay": 0.0, "final": 1.0}
    whole = run(tmp_path / "whole", schedule={"steps": 6, **stable})
    run(tmp_path / "parts", schedule={"steps": 4, **stable})
    parts = run(tmp_path / "parts", schedule={"steps": 6, **stable})
    assert all((results(whole)["state"][name] == tensor).all() for name, tensor in results(parts)["state"].items())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"optimizer": {"lr": 2e-2}}, r"optimizer\.lr=0\.02.*0\.01"),
        ({"run": {"seed": 6}}, r"run\.seed=6.*5"),
        ({"run": {"accumulate": 1}}, r"run\.accumulate=1.*2"),
        ({"run": {"dtype": "float32"}}, r"run\.dtype='float32'.*'bfloat16'"),
        ({"data": {"sequence_length": 32}}, r"data\.sequence_length=32.*24"),
        ({"loss": {"mtp_weight": 0.5}}, r"loss\.mtp_weight=0\.5.*None"),
        ({"model": {"path": "elsewhere", "config": {}}}, r"model\.config\..*=None.*"),
    ],
)
def test_a_run_with_other_settings_is_refused_by_name(uninterrupted: Path, changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        run(uninterrupted.parent, **changes)


def test_a_run_with_another_model_size_is_refused_by_name(uninterrupted: Path) -> None:
    tables = settings(uninterrupted.parent)
    tables["model"] = {"config": tables["model"]["config"] | {"hidden_size": 32}}
    with pytest.raises(ConfigError, match=r"model\.config\.hidden_size=32.*16"):
        train(TrainConfig.from_dict(tables))


def test_a_run_on_other_documents_is_refused_by_name(tmp_path: Path, uninterrupted: Path) -> None:
    other = write_store(tmp_path / "other", random_documents(3, [50, 60]))
    with pytest.raises(ConfigError, match=r"data\.train=.*other"):
        run(uninterrupted.parent, data={"train": [str(other)]})


def test_documents_may_move_and_what_only_reports_may_change(tmp_path: Path) -> None:
    output = run(tmp_path, schedule={"steps": 2})
    moved = tmp_path / "moved"
    (tmp_path / "data" / "train").rename(moved)
    run(
        tmp_path,
        data={"train": [str(moved)], "validation": {}},
        schedule={"steps": 4},
        run={"log_every": 1, "gradient_checkpointing": True, "keep": 5},
    )
    assert results(output)["step"] == "step-00000004"

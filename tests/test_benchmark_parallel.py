"""The benchmark of several ranks, on two processes without a GPU."""

import json
from pathlib import Path

import pytest
from benchmarks import parallel
from benchmarks.alone import PUBLISHED
from tests.conftest import tiny_config
from tests.model.parallel_ranks import run_ranks

SIZES = parallel.Sizes(prompt=70, context=20, streams=(1, 3), steps=3, repeats=1, token_budget=128, memory_bytes=2**25)


def on_a_rank(file: Path) -> int:
    settings = {name: getattr(tiny_config(), name) for name in PUBLISHED}
    options = ["--device", "cpu", "--dtype", "float32", "--quantizations", "none", "--layers", "4"]
    return parallel.main([*options, "--json", str(file)], settings, SIZES)


def with_another_text(file: Path) -> int:
    parallel.logits = lambda model, whole=parallel.logits: whole(model) * (model.config.num_attention_heads)
    return on_a_rank(file)


def test_both_cuts_are_checked_and_measured_beside_one(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert run_ranks(2, on_a_rank, file) == [0, 0]
    rows = json.loads(file.read_text())["rows"]
    works = ["prefill 70", "decode 1, context 20", "decode 3, context 20"]
    assert [(row["where"], row["work"]) for row in rows] == [(n, w) for n in ("one", "tp 2", "ep 2") for w in works]
    assert all(row["seconds"] > 0 and row["scaled"] > row["seconds"] for row in rows)
    assert [row["ratio"] for row in rows[:3]] == [1.0] * 3


def test_ranks_that_compute_something_else_are_not_timed(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert run_ranks(2, with_another_text, file) == [parallel.RED] * 2
    assert not file.exists()


def test_a_single_process_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert parallel.main(["--device", "cpu"]) == parallel.UNUSABLE
    assert "at least two processes" in capsys.readouterr().out

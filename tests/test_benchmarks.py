"""The benchmark beside transformers measures every row it promises, and keeps silent where the results differ."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "model.py"
ROWS = [
    "prefill 5 tokens",
    "prefill 70 tokens",
    "decode 1 stream, context 6",
    "decode 3 streams, context 6",
    "load a checkpoint",
]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    specification = importlib.util.spec_from_file_location("benchmark_of_the_model", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def test_every_row_is_measured_beside_transformers(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "results.json"
    assert benchmark.main(["--preset", "tiny", "--json", str(file), "--scratch", str(tmp_path)]) == 0
    record = json.loads(file.read_text())
    assert [row["work"].split(", 0.")[0] for row in record["rows"]] == ROWS
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in record["rows"])
    assert all(row["implementation"] in benchmark.IMPLEMENTATIONS for row in record["rows"][:-1])
    assert record["skipped"] == []
    shown = capsys.readouterr().out
    assert all(work in shown for work in ROWS)
    assert list(tmp_path.iterdir()) == [file], "the checkpoint of the load row must not stay behind"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_models_agree_before_anything_is_timed(benchmark: ModuleType, dtype: str) -> None:
    precision = getattr(torch, dtype)
    pair = benchmark.make_pair(benchmark.PRESETS["tiny"].config, torch.device("cpu"), precision)
    assert 0 <= benchmark.check(pair) <= benchmark.BOUNDS[precision]
    weights = dict(pair.theirs.named_parameters())
    assert all(weights[name].data_ptr() == p.data_ptr() for name, p in pair.ours.named_parameters())


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_wrong_logits_print_no_speed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: float
) -> None:
    honest = benchmark.logits_of

    def wrong(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return honest(model, tokens) * (1 + error if isinstance(model, benchmark.Qwen3NextForCausalLM) else 1)

    monkeypatch.setattr(benchmark, "logits_of", wrong)
    monkeypatch.setattr(benchmark, "measurements", lambda *_: pytest.fail("something was measured"))
    assert benchmark.main(["--preset", "tiny"]) == 1
    shown = capsys.readouterr().out
    assert "No speed is printed" in shown
    assert "tokens/s" not in shown


def test_rows_that_do_not_fit_the_time_are_named(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--preset", "tiny", "--seconds", "0"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Not measured" in shown
    assert all(work in shown for work in ROWS)


def test_copies_of_experts_that_would_not_fit_are_not_tried(benchmark: ModuleType) -> None:
    pair = benchmark.make_pair(benchmark.SHAPES_TINY, torch.device("cpu"), torch.float32)
    assert "batched_mm" in pair.implementations(1)
    assert "batched_mm" not in pair.implementations(10**6)

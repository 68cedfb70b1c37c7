"""The benchmark of the engine on a GPU measures every row that it promises, beside floors that are arithmetic."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import serve
from benchmarks.alone import PUBLISHED
from benchmarks.operations.measure import H200
from benchmarks.serving import floors, main, rows, setting, startup
from benchmarks.serving.forced import forced_acceptance
from tests.conftest import tiny_config

from qwen3_next import Qwen3NextConfig
from qwen3_next.engine import Engine
from qwen3_next.model.bare import BareCausalLM

SETTINGS: dict[str, Any] = {name: getattr(tiny_config(), name) for name in PUBLISHED}
SIZES = rows.Sizes(
    prompts=(70,), context=20, streams=(1, 3), long=130, drafted=(2,), forced=(2,), rates=(0.0, 0.9), hosted=2,
    steps=3, repeats=1, token_budget=128,
)  # fmt: skip


def options(tmp_path: Path, *names: str) -> argparse.Namespace:
    return argparse.Namespace(
        device="cpu", layers=4, quantization="none", dtype="float32", rows=names, minutes=5.0,
        json=tmp_path / "rows.json",
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that take little memory."""
    whole = setting.Setting.engine

    def limited(self: setting.Setting, **limits: Any) -> Engine:
        return whole(self, **(limits | {"memory_bytes": 2**25}))

    monkeypatch.setattr(setting.Setting, "engine", limited)


@pytest.mark.usefixtures("small")
def test_every_row_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(options(tmp_path, *rows.ROWS), SETTINGS, SIZES, H200) == 0
    found = {row["work"]: row for row in json.loads((tmp_path / "rows.json").read_text())["rows"]}
    assert list(found) == [
        "prefill 70",
        "decode 1, context 20",
        "decode 3, context 20",
        "decode 1, context 130",
        "decode at 130, as many as fit",
        "step with 2 drafts, 2",
        "drafts at 0%, 2 streams",
        "drafts at 90%, 2 streams",
        "host, 2 streams",
        "second turn of a chat of 130",
    ]
    assert all(row["seconds"] > row["floor"] > 0 for row in found.values() if row["seconds"] is not None)
    assert found["drafts at 0%, 2 streams"]["figures"]["accepted"] == 0
    assert found["drafts at 90%, 2 streams"]["figures"]["accepted"] > 0.5
    assert "SCALED to 48 layers" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_text_that_a_batch_changes_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "agreement", lambda _: float("nan"))
    assert main.run(options(tmp_path, "prefill"), SETTINGS, SIZES, H200) == main.RED
    assert "tok/s" not in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_agreement_sees_another_context(monkeypatch: pytest.MonkeyPatch) -> None:
    made = setting.Setting(setting.random_model(SETTINGS, 4, "cpu", "none", "float32"))
    assert setting.agreement(made) < 1e-3
    whole = setting.added

    def shifted(engine: Engine, prompts: Any, tokens: int, **params: Any) -> list[str]:
        changed = [(*one[1:], one[0]) for one in prompts] if "prompt_logprobs" in params else prompts
        return whole(engine, changed, tokens, **params)

    monkeypatch.setattr(setting, "added", shifted)
    assert setting.agreement(made) > main.TOLERANCE


def test_the_floor_of_a_step_is_that_of_the_network_alone() -> None:
    """The same bytes as `benchmarks.alone` counts, and the key that each stream writes."""
    with torch.device("meta"):
        model = BareCausalLM(Qwen3NextConfig(**PUBLISHED, num_hidden_layers=48), True).bfloat16()
    moved = floors.step_bytes(model, floors.Rows([1_024] * 16))
    active = 2 * (3.25e9 + 151936 * 2048) + 2 * 48 * 128.5 * 3 * 512 * 2048
    states, keys = 2 * 36 * (32 * 128 * 128 * 4 + 8192 * 3 * 2), 12 * 2 * 2 * 256 * 2
    assert moved == pytest.approx(active + 16 * (states + 1_025 * keys), rel=5e-3)
    woken = floors.step_bytes(model, floors.Rows([1_024] * 16, experts=512.0))
    assert woken - moved == pytest.approx(2 * 48 * (512 - 138.5) * 3 * 512 * 2048, rel=5e-3)
    head = 2 * 151936 * 2048
    assert floors.step_bytes(model, floors.Rows([1_024], 2)) > floors.step_bytes(model, floors.Rows([1_024])) + 2 * head


def test_starting_up_is_measured_twice() -> None:
    found = list(startup.startup(SETTINGS, 4, "cpu", "none", "float32"))
    assert [row.work for row in found] == ["start-up, cold", "start-up, warm"]
    assert all(seconds > 0 for row in found for seconds in row.figures.values())


def test_without_a_gpu_nothing_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert serve.main(["--device", "cuda"]) == main.UNUSABLE
    assert "needs a CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_the_coin_decides_how_many_drafts_are_accepted(rate: float) -> None:
    from qwen3_next.engine import engine
    from qwen3_next.engine.sampler import Drawn

    with forced_acceptance(rate) as coin:
        found = engine.verify([Drawn(1), Drawn(2), Drawn(3)], (7, 8))
    assert [one.token for one in found] == ([7, 8, 3] if rate else [1])
    assert (coin.proposed, coin.accepted) == ((2, 2) if rate else (1, 0))

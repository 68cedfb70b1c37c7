"""The comparison with the dense model measures what it says, at tiny shapes on a CPU."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import alone, headline
from benchmarks.claim import dense, measure
from benchmarks.claim.rows import FULL, ONE, PREFILL, served
from benchmarks.operations.measure import H200
from tests.conftest import tiny_config
from transformers import DynamicCache

OURS: dict[str, Any] = {name: getattr(tiny_config(), name) for name in alone.PUBLISHED}
THEIRS: dict[str, Any] = dense.QWEN3_32B | {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8,
}  # fmt: skip
SETUP = measure.Setup(
    device="cpu", dtype=torch.bfloat16, ours=OURS, theirs=THEIRS, layers=(4, 2), contexts=(40, 70), card_bytes=3e7,
    chunk=32, repeats=1,
)  # fmt: skip


def options(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    given = {"rows": None, "served": None, "json": tmp_path / "rows.json", "plot": tmp_path / "plot.png"}
    return argparse.Namespace(**(given | changes))


def test_every_row_is_measured_and_drawn_again_from_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "streams", lambda _, context: (3, 2))
    assert headline.run(options(tmp_path), SETUP) == 0
    first = capsys.readouterr().out
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["work"], row["context"]) for row in rows] == [(w, c) for w in (PREFILL, FULL, ONE) for c in (40, 70)]
    assert [row["streams"] for row in rows] == [[1, 1]] * 2 + [[3, 2]] * 2 + [[1, 1]] * 2
    assert all(row["ours"] > 0 and row["dense"] > 0 for row in rows)
    (tmp_path / "plot.png").unlink()
    assert headline.main(["--from", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "plot.png")]) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_layer_that_differs_is_not_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "differences", lambda _: [alone.Difference(float("nan"), 1.0)])
    assert headline.run(options(tmp_path), SETUP) == headline.RED
    assert "No speed" in capsys.readouterr().out
    assert not (tmp_path / "rows.json").exists()


def test_streams_that_fit_are_those_of_the_whole_models() -> None:
    """By hand: 24,576 and 262,144 bytes a token, 77 MB a state, 81 and 33.5 GB of fp8 weights (published shapes)."""
    ours, theirs = measure.streams(measure.Setup(), 32_768)
    assert ours == pytest.approx((134e9 - 81e9) / (32_768 * 24_576 + 77e6), rel=0.03)
    assert theirs == int((133.95e9 - 33.5e9) / (32_768 * 262_144))


def test_only_layers_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 1 s and layers of 2 s, three times as many: 7 s."""
    times = {"head": 1.0, "work": 3.0}
    monkeypatch.setattr(measure, "seconds", lambda _, call: times[call()])
    head, work = (lambda *_: lambda: "head"), (lambda *_: lambda: "work")
    found = measure.speeds(SETUP, 3.0, work, work, head, {40: 2, 70: 5})
    assert found[PREFILL, 70] == pytest.approx(70 / 7)
    assert found[FULL, 70] == pytest.approx(5 / 7)
    assert found[ONE, 40] == pytest.approx(1 / 7)


@torch.inference_mode()
def test_the_dense_step_is_that_of_transformers() -> None:
    """With the keys of a prompt in its place it gives the logits that the model gives of the whole text."""
    model = dense.dense_model(THEIRS, 2, "cpu", torch.float32)
    tokens = torch.randint(0, 97, (2, 12))
    cache = DynamicCache(config=model.config)
    model(tokens[:, :-1], past_key_values=cache, use_cache=True)
    kept = dense.FilledKeys(model.config, 2, 12, model.lm_head.weight)
    for layer, (keys, values, *_) in enumerate(cache):
        assert keys is not None
        assert values is not None
        kept.keys[layer, :, :, :-1], kept.values[layer, :, :, :-1] = keys, values
    places = torch.full((2, 1), 11)
    given: dict[str, Any] = {"attention_mask": {"full_attention": None}, "position_ids": places}
    found = model(tokens[:, -1:], past_key_values=kept, use_cache=True, **given).logits  # type: ignore[arg-type]
    torch.testing.assert_close(found[:, -1], model(tokens).logits[:, -1])


def test_rows_of_the_engine_stand_beside_the_other_run() -> None:
    rates = {name: getattr(H200, name) for name in ("copy", "read", "bf16", "fp8")}
    made = [
        {"work": "prefill 32,768", "tokens": 32_768, "seconds": 0.5, "figures": {}},
        {"work": "decode 1, context 1,024", "tokens": 1, "seconds": 0.004, "figures": {}},
        {"work": "drafts at 70%, 1 streams", "tokens": 0, "seconds": None, "figures": {"ratio": 1.5}},
        {"work": "decode at 131,072, as many as fit", "tokens": 15, "seconds": 0.02, "figures": {}},
        {"work": "host, 64 streams", "tokens": 0, "seconds": None, "figures": {}},
    ]
    prefill, one, full = served({"rates": rates, "rows": made})
    assert prefill.ratio == pytest.approx(65_536 / 8_424)
    assert one.drafted == pytest.approx(375)
    assert (full.dense, full.ratio) == (None, None)
    # 31.2 GB of layers in fp8, a head of 1.56 GB, 34.4 GB of keys and values.
    assert full.floor == pytest.approx(4.4e12 / (31.2e9 + 1.56e9 + 131_072 * 262_144), rel=0.01)
    assert all(row.is_fp8 for row in (prefill, one, full))


def test_without_a_gpu_nothing_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert headline.main([]) == headline.UNUSABLE
    assert "needs a CUDA device" in capsys.readouterr().err

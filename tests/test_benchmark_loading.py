"""The benchmark of loading compares with the files before it prints, and measures every row that it promises."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import loading
from benchmarks.model import SHAPES_TINY

from qwen3_next.engine.loading import read_config
from qwen3_next.model.bare import BareCausalLM

WAYS = [(files, way) for files in loading.SCALES for way in ("auto", "fp8" if files == "bf16" else "none")]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny shapes, and no process for each row."""

    def in_this_process(folder: Path, files: str, quantization: str, device: str, cold: bool) -> loading.Row:
        return loading.measure(folder, files, quantization, torch.device(device), cold)

    monkeypatch.setitem(loading.SHAPES, "small", SHAPES_TINY)
    monkeypatch.setattr(loading, "measured", in_this_process)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("cold", [False, True])
def test_every_way_to_load_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], cold: bool) -> None:
    file = tmp_path / "rows.json"
    assert loading.main(["--layers", "1", "--json", str(file), *(["--cold"] if cold else [])]) == 0
    rows = json.loads(file.read_text())
    assert [(row["files"], row["quantization"]) for row in rows] == WAYS
    assert all(row["is_right"] and row["seconds"] > 0 and row["plain_seconds"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_the_memory_of_a_row_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    loading.write(tmp_path, SHAPES_TINY | {"num_hidden_layers": 1, "vocab_size": 2**18}, None)
    row = loading.measured(tmp_path, "bf16", "auto", "cpu", cold=False)
    assert row.is_right
    assert 2 * 2**18 * 32 * 2 < row.model_bytes < row.host_bytes < 2**30


@pytest.mark.parametrize(("files", "way"), WAYS)
def test_any_other_value_than_the_files_is_found(tmp_path: Path, files: str, way: str) -> None:
    loading.write(tmp_path, SHAPES_TINY | {"num_hidden_layers": 1}, loading.SCALES[files])
    config, cpu = read_config(tmp_path), torch.device("cpu")
    model = BareCausalLM.from_directory(tmp_path, config, torch.bfloat16, cpu, quantization=way)  # type: ignore[arg-type]
    assert loading.check(model, tmp_path)
    for name, tensor in model.state_dict().items():
        if name.endswith(("embed_tokens.weight", "gate_up_proj", "gate_up_proj_scale_inv")):
            last = tensor[1, -1, -1:] if tensor.dim() == 3 else tensor[-1, -1:]  # of expert 1
            kept = last.clone()
            last.copy_(torch.full_like(last.float(), 3.25))
            assert not loading.check(model, tmp_path), name
            last.copy_(kept)
    assert loading.check(model, tmp_path)


@pytest.mark.usefixtures("tiny")
def test_no_speed_of_a_model_that_is_not_right(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loading, "check", lambda *_: False)
    assert loading.main(["--layers", "1"]) == loading.RED
    assert capsys.readouterr().out == ""

"""docs/training.md says what the code does: its defaults are the code's, and its first run works."""

import re
import subprocess
import sys
import tomllib
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from qwen3_next.train import TrainConfig, train
from qwen3_next.train import config as tables

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_page_lists_every_setting_with_its_default() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    listed = tomllib.loads(block)
    optional = set(re.findall(r"^# (\w+) +# left out", block, re.MULTILINE))
    assert listed.keys() == {f.name for f in fields(TrainConfig)}
    for name, values in listed.items():
        known = fields(getattr(tables, f"{name.title()}Settings"))
        assert {f.name for f in known} == values.keys() | (optional if name == "loss" else set())
        for field in known:
            if field.default_factory is not MISSING:
                assert values[field.name] == field.default_factory()
            elif field.default not in (MISSING, None):
                shown = values[field.name]
                assert (tuple(shown) if isinstance(shown, list) else shown) == field.default, field.name


def test_the_first_run_of_the_page_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, toml = re.findall(r"<<'EOF'\n(.*?)\nEOF", PAGE, re.DOTALL)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "src").symlink_to(ROOT / "src")
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-c", script], check=True)
    (tmp_path / "runs" / "first" / "train.toml").write_text(toml, encoding="utf-8")
    settings = tomllib.loads(toml)
    settings["schedule"] = {"steps": 2}
    settings["data"]["validation"] = {}
    result = train(TrainConfig.from_dict(settings))
    assert result.finished
    assert (result.model / "tokenizer.json").is_file()

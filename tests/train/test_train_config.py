"""The TOML of a run: complete or refused, each time with one clear line."""

from pathlib import Path
from typing import Any

import pytest
from tests.train.runs import settings

from qwen3_next import ConfigError
from qwen3_next.train import TrainConfig

RECIPES = Path(__file__).parents[2] / "recipes" / "shipped_model"


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Any]:
    return settings(tmp_path)


def changed(tables: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`tables` with the value at a dotted path replaced, or removed where it is None."""
    name, _, rest = path.partition(".")
    if rest:
        return tables | {name: changed(tables.get(name, {}), rest, value)}
    return {k: v for k, v in (tables | {name: value}).items() if v is not None}


@pytest.mark.parametrize("name", ["train.toml", "train_stage2.toml"])
def test_the_shipped_models_recipe_is_a_valid_configuration(name: str) -> None:
    path = RECIPES / name
    if path.exists():
        assert TrainConfig.from_toml(path).schedule.kind == "wsd"


def test_toml_becomes_settings_and_what_is_left_out_takes_its_default(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        '[model]\npath = "m"\n[data]\ntrain = ["a", "b"]\n[data.validation]\nx = "v"\n'
        '[optimizer]\nlr = 1\nbetas = [0, 0.5]\n[schedule]\nsteps = 3\n[run]\noutput = "o"\n'
    )
    config = TrainConfig.from_toml(file)
    assert config.data.train == ("a", "b")
    assert config.data.validation == {"x": "v"}
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.eps) == (1, (0, 0.5), 1e-8)
    assert (config.schedule.kind, config.loss.mtp_weight, config.run.dtype) == ("cosine", None, "bfloat16")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # unknown keys, with the nearest known one
        ("optimiser", {}, "unknown key optimiser; did you mean 'optimizer'"),
        ("optimizer.learning_rate", 1.0, "unknown key optimizer.learning_rate; allowed are betas, clip"),
        ("run.checkpoints_every", 1, "unknown key run.checkpoints_every; did you mean 'checkpoint_every'"),
        ("model.config.num_expert", 8, "unknown key model.config.num_expert; did you mean 'num_experts'"),
        # missing tables and values
        ("schedule", None, "schedule is missing"),
        ("schedule.steps", None, r"schedule\.steps is missing"),
        ("data.train", None, r"data\.train is missing"),
        ("run.output", None, r"run\.output is missing"),
        # types
        ("data", "x", r"data='x' must be a table; write \[data\]"),
        ("data.train", "x", r"data\.train='x' must be a list of strings"),
        ("data.train", ["x", 1], r"data\.train=\['x', 1\] must be a list of strings"),
        ("data.validation", ["x"], r"data\.validation=\['x'\] must be a table of strings"),
        ("data.validation", {"x": {"y": "z"}}, r"data\.validation=.* must be a table of strings"),
        ("data.tokenizer", True, r"data\.tokenizer=True must be a string"),
        ("model.config", "x", r"model\.config='x' must be a table"),
        ("optimizer.betas", [0.9, 0.95, 0.99], r"optimizer\.betas=\[0\.9, 0\.95, 0\.99\] must be a list of 2 numbers"),
        ("optimizer.betas", ["a", "b"], r"optimizer\.betas=.* must be a list of 2 numbers"),
        ("optimizer.betas", 0.9, r"optimizer\.betas=0\.9 must be a list of 2 numbers"),
        ("optimizer.lr", "fast", r"optimizer\.lr='fast' must be a number"),
        ("optimizer.lr", True, r"optimizer\.lr=True must be a number"),
        ("optimizer.lr", [1e-3], r"optimizer\.lr=\[0\.001\] must be a number"),
        ("schedule.steps", 2.5, r"schedule\.steps=2\.5 must be a whole number"),
        ("schedule.kind", "linear", r"schedule\.kind='linear' must be one of 'cosine', 'wsd'"),
        ("run.dtype", "float16", r"run\.dtype='float16' must be one of 'bfloat16', 'float32'"),
        ("run.gradient_checkpointing", 1, r"run\.gradient_checkpointing=1 must be true or false"),
        ("loss.mtp_weight", "x", r"loss\.mtp_weight='x' must be a number"),
        ("loss", {"balance_count_first": {"a": 1}}, r"loss\.balance_count_first=.* must be true or false"),
        # bounds
        ("optimizer.lr", -1e-3, r"optimizer\.lr=-0\.001 is out of bounds.*from 0 to 10"),
        ("optimizer.lr", float("nan"), r"optimizer\.lr=nan is out of bounds"),
        ("optimizer.clip", float("inf"), r"optimizer\.clip=inf is out of bounds.*finite"),
        ("optimizer.betas", [0.9, 1.0], r"optimizer\.betas\[1\]=1\.0 is out of bounds"),
        ("schedule.steps", 0, r"schedule\.steps=0 is out of bounds.*at least 1"),
        ("schedule.warmup_steps", 7, r"schedule\.warmup_steps=7 is out of bounds.*from 0 to 6"),
        ("schedule.decay", 1.5, r"schedule\.decay=1\.5"),
        ("loss.balance_coefficient", -1, r"loss\.balance_coefficient=-1"),
        ("run.accumulate", 0, r"run\.accumulate=0"),
        ("run.keep", 0, r"run\.keep=0"),
        ("run.seed", -1, r"run\.seed=-1"),
        ("run.max_seconds", -1, r"run\.max_seconds=-1"),
        ("data.tokens_per_batch", 23, r"data\.tokens_per_batch=23 is out of bounds.*at least 24"),
        # what belongs together, names of devices, models
        ("data.train", [], r"data\.train names no file"),
        ("run.output", "", r"run\.output is empty"),
        ("model.path", "x", r"\[model\] needs either path"),
        ("model", {}, r"\[model\] needs either path"),
        ("run.device", "tpu", r"run\.device='tpu'; write 'auto', 'cpu', 'cuda' or 'cuda:N'"),
        ("run.device", "cuda:x", r"run\.device='cuda:x'; write"),
        ("model.config.num_key_value_heads", 3, "num_key_value_heads"),
        ("model.config.hidden_size", "wide", "hidden_size"),
        ("model.config.rms_norm_eps", "small", "rms_norm_eps"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    tables: dict[str, Any], path: str, value: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(changed(tables, path, value))


@pytest.mark.parametrize("content", [b"[model\n", b"\xff\xfe", None])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read the training configuration .*run\.toml"):
        TrainConfig.from_toml(file)


def test_settings_built_in_python_are_checked_as_well(tables: dict[str, Any]) -> None:
    config = TrainConfig.from_dict(tables)
    fields = {name: getattr(config, name) for name in ("model", "data", "schedule", "run")}
    settings_type = type(config.optimizer)
    with pytest.raises(ConfigError, match=r"optimizer\.eps='x' must be a number"):
        TrainConfig(**fields, optimizer=settings_type(eps="x"))  # pyright: ignore[reportArgumentType]

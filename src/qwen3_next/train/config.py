"""Everything a training run is told, read from TOML: frozen, complete and checked at birth."""

import difflib
import math
import re
import tomllib
from collections.abc import Collection
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from huggingface_hub.errors import StrictDataclassError

from qwen3_next.config import OTHER_SPELLINGS, Qwen3NextConfig
from qwen3_next.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Where the model comes from: a checkpoint, or a configuration with fresh weights.

    Attributes:
        path: a checkpoint directory or hub id; empty for a fresh model.
        config: the fields of a fresh model's `Qwen3NextConfig`.
    """

    path: str = ""
    config: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What the model reads.

    Attributes:
        train: JSON-lines files (`text` or `messages` in each row; .zst is read too) or tokenised directories.
        validation: named sets of the same kinds.
        tokenizer: a tokenizer directory or hub id; needed for JSON lines, and copied beside the exported model.
        sequence_length: tokens of a document that are read in one piece at most.
        tokens_per_batch: tokens of one packed batch, the unit of accumulation; at least `sequence_length`.
    """

    train: tuple[str, ...]
    validation: dict[str, str] = field(default_factory=dict[str, str])
    tokenizer: str = ""
    sequence_length: int = 2048
    tokens_per_batch: int = 16384


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) and gradient clipping by global norm (0: none)."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ScheduleSettings:
    """The learning rate over the steps.

    Attributes:
        kind: "cosine" falls from the end of the warm-up to the last step; "wsd" (warm-up, stable, decay) stays and
            falls linearly over the last `decay` share of the steps.
        steps: optimiser steps in all.
        warmup_steps: steps of linear rise.
        decay: share of the steps that "wsd" falls in.
        final: what it falls to after the last step, as a share of the peak.
    """

    kind: Literal["cosine", "wsd"] = "cosine"
    steps: int
    warmup_steps: int = 0
    decay: float = 0.2
    final: float = 0.1


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The parts of the loss.

    Attributes:
        mtp_weight: weight of multi-token prediction; None takes the model's.
        balance_coefficient: weight of the load-balancing loss; None takes the model's.
        balance_count_first: count the experts' load over the whole accumulation window before the first gradient. Exact
            whatever the accumulation, for one more forward pass; otherwise each batch uses the counts so far.
    """

    mtp_weight: float | None = None
    balance_coefficient: float | None = None
    balance_count_first: bool = False


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How, where and how long to run.

    Attributes:
        output: directory of checkpoints, logs, plot and exported model.
        seed: of fresh weights and of the order of the documents.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: of computation; master weights are always fp32.
        accumulate: batches per optimiser step, those of all processes together.
        checkpoint_every, validate_every, log_every: in steps; 0 for checkpoints and validation only at the end.
        keep: how many checkpoints to keep.
        gradient_checkpointing: recompute activations in the backward pass.
        max_seconds: stop cleanly with a checkpoint after this long; 0 for no limit.
    """

    output: str
    seed: int = 0
    device: str = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    accumulate: int = 1
    checkpoint_every: int = 500
    validate_every: int = 500
    log_every: int = 10
    keep: int = 2
    gradient_checkpointing: bool = False
    max_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How several processes train one model; without effect in a single one.

    Attributes:
        experts: how many neighbouring ranks share one set of experts; 1 for no expert parallelism. Must divide the
            number of processes and of experts.
        timeout: after so many seconds without another rank's answer a rank gives up. Longer than the longest thing that
            one does alone: tokenising, writing the files of a checkpoint.
    """

    experts: int = 1
    timeout: float = 600.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run; each field is a table of the TOML file.

    Raises:
        ConfigError: a value of another type or outside its bounds.
    """

    model: ModelSettings
    data: DataSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings
    loss: LossSettings = LossSettings()
    run: RunSettings
    parallel: ParallelSettings = ParallelSettings()

    def __post_init__(self) -> None:
        for table in fields(self):
            _check_types(table.name, getattr(self, table.name))
        _check_bounds(self)
        _check_sources(self)
        if self.model.config:
            _check_model(self.model.config)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the log and for comparing with a checkpoint."""
        return asdict(self)

    @classmethod
    def from_toml(cls, path: Path | str) -> "TrainConfig":
        """Read a TOML file.

        Raises:
            ConfigError: the file is missing or not TOML; a key is unknown, a value missing, of another type or outside
                its bounds.
        """
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read the training configuration {path}: {error}.") from error
        return cls.from_dict(table)

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> "TrainConfig":
        """Build from nested plain values, as `from_toml` does."""
        return _build(cls, table, "")


C = TypeVar("C")


def _build(cls: type[C], table: dict[str, Any], where: str) -> C:
    known = {f.name: f for f in fields(cast(Any, cls))}
    _refuse_unknown(table, known, where)
    for name, f in known.items():
        if name not in table and f.default is MISSING and f.default_factory is MISSING:
            raise ConfigError(f"{where}{name} is missing; docs/training.md lists what every table must hold.")
    hints = get_type_hints(cls)
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in table.items()})


def _refuse_unknown(table: Collection[str], known: Collection[str], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(sorted(known))}."
            raise ConfigError(f"unknown key {where}{key}; {hint}")


def _convert(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise ConfigError(f"{name}={value!r} must be a table; write [{name}].")
        return _build(cast("type[Any]", hint), cast("dict[str, Any]", value), f"{name}.")
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _check_types(table: str, settings: Any) -> None:
    for name, hint in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if not _fits(value, hint):
            shown: Any = list(cast("tuple[Any]", value)) if isinstance(value, tuple) else value
            raise ConfigError(f"{table}.{name}={shown!r} must be {_described(hint)}.")


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        items = cast("tuple[Any, ...]", value)
        wanted = inner[:1] * len(items) if inner[-1] is Ellipsis else inner
        return len(items) == len(wanted) and all(map(_fits, items, wanted))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in cast("dict[str, Any]", value).values())
    if inner:
        return any(_fits(value, choice) for choice in inner)
    return type(value) is hint or (hint is float and type(value) is int)


def _described(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if origin is tuple:
        count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
        return f"a list of {count}{_PLURALS[inner[0]]}"
    if origin is dict:
        return "a table" + (f" of {_PLURALS[inner[1]]}" if inner[1] in _PLURALS else "")
    return _SINGULARS[inner[0] if inner else hint]


_PLURALS = {str: "strings", float: "numbers"}
_SINGULARS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}


def _check_bounds(c: TrainConfig) -> None:
    bounds: list[tuple[str, float, float, float]] = [
        ("data.sequence_length", c.data.sequence_length, 2, math.inf),
        ("data.tokens_per_batch", c.data.tokens_per_batch, c.data.sequence_length, math.inf),
        ("optimizer.lr", c.optimizer.lr, 0, 10),
        ("optimizer.eps", c.optimizer.eps, 0, 1),
        ("optimizer.weight_decay", c.optimizer.weight_decay, 0, 10),
        ("optimizer.clip", c.optimizer.clip, 0, math.inf),
        ("optimizer.betas[0]", c.optimizer.betas[0], 0, 0.99999),
        ("optimizer.betas[1]", c.optimizer.betas[1], 0, 0.999999),
        ("schedule.steps", c.schedule.steps, 1, math.inf),
        ("schedule.warmup_steps", c.schedule.warmup_steps, 0, c.schedule.steps),
        ("schedule.decay", c.schedule.decay, 0, 1),
        ("schedule.final", c.schedule.final, 0, 1),
        ("loss.mtp_weight", c.loss.mtp_weight or 0.0, 0, math.inf),
        ("loss.balance_coefficient", c.loss.balance_coefficient or 0.0, 0, math.inf),
        ("run.seed", c.run.seed, 0, 2**63 - 1),
        ("run.accumulate", c.run.accumulate, 1, math.inf),
        ("run.checkpoint_every", c.run.checkpoint_every, 0, math.inf),
        ("run.validate_every", c.run.validate_every, 0, math.inf),
        ("run.log_every", c.run.log_every, 1, math.inf),
        ("run.keep", c.run.keep, 1, math.inf),
        ("run.max_seconds", c.run.max_seconds, 0, math.inf),
        ("parallel.experts", c.parallel.experts, 1, math.inf),
        ("parallel.timeout", c.parallel.timeout, 1, math.inf),
    ]
    for name, value, low, high in bounds:
        if not (low <= value <= high and math.isfinite(value)):
            allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ConfigError(f"{name}={value} is out of bounds; it must be a finite number, {allowed}.")


def _check_sources(c: TrainConfig) -> None:
    if not c.data.train:
        raise ConfigError("data.train names no file; list JSON-lines files or tokenised directories.")
    if bool(c.model.path) == bool(c.model.config):
        raise ConfigError("[model] needs either path (a checkpoint) or a table [model.config] (a fresh model).")
    if not c.run.output:
        raise ConfigError("run.output is empty; name the directory for checkpoints, logs and the trained model.")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", c.run.device):
        raise ConfigError(f"run.device={c.run.device!r}; write 'auto', 'cpu', 'cuda' or 'cuda:N'.")


def _check_model(config: dict[str, Any]) -> None:
    """Refuse what cannot be served before any data is read; a misspelt field would silently become a default."""
    known = {f.name for f in fields(cast(Any, Qwen3NextConfig))}
    _refuse_unknown(config, known | {"model_type", *OTHER_SPELLINGS}, "model.config.")
    try:
        Qwen3NextConfig(**config)
    except (StrictDataclassError, TypeError) as error:
        raise ConfigError(f"[model.config]: {' '.join(str(error).split())}.") from error

"""Qwen3-Next: load it, run it, train it, save it.

import qwen3_next
qwen3_next.register()  # the Auto classes of transformers now return the classes of this package

What needs torch and transformers is imported when it is first asked for, so that `qwen3-next --help` and a first token
do not wait for it.
"""

import importlib
from typing import TYPE_CHECKING

from qwen3_next.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    EngineError,
    InputError,
    Qwen3NextError,
    TrainingError,
)

if TYPE_CHECKING:
    from qwen3_next.auto import register
    from qwen3_next.config import Qwen3NextConfig
    from qwen3_next.engine import LLM, AsyncEngine, Engine, EngineConfig, SamplingParams
    from qwen3_next.model import (
        Qwen3NextForCausalLM,
        Qwen3NextForQuestionAnswering,
        Qwen3NextForSequenceClassification,
        Qwen3NextForTokenClassification,
        Qwen3NextModel,
        Qwen3NextPreTrainedModel,
    )

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncEngine",
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineError",
    "InputError",
    "Qwen3NextConfig",
    "Qwen3NextError",
    "Qwen3NextForCausalLM",
    "Qwen3NextForQuestionAnswering",
    "Qwen3NextForSequenceClassification",
    "Qwen3NextForTokenClassification",
    "Qwen3NextModel",
    "Qwen3NextPreTrainedModel",
    "SamplingParams",
    "TrainingError",
    "__version__",
    "register",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    engine = dict.fromkeys(("LLM", "AsyncEngine", "Engine", "EngineConfig", "SamplingParams"), "engine")
    module = {"register": "auto", "Qwen3NextConfig": "config", **engine}.get(name, "model")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return __all__

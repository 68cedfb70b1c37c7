"""Qwen3-Next: load it, run it, train it, save it.

import qwen3_next
qwen3_next.register()  # the Auto classes of transformers now return the classes of this package
"""

from qwen3_next.auto import register
from qwen3_next.config import Qwen3NextConfig
from qwen3_next.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    InputError,
    Qwen3NextError,
    TrainingError,
)
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
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "Qwen3NextConfig",
    "Qwen3NextError",
    "Qwen3NextForCausalLM",
    "Qwen3NextForQuestionAnswering",
    "Qwen3NextForSequenceClassification",
    "Qwen3NextForTokenClassification",
    "Qwen3NextModel",
    "Qwen3NextPreTrainedModel",
    "TrainingError",
    "__version__",
    "register",
]

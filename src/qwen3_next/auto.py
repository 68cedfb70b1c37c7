"""Put this package's classes behind transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from qwen3_next import model
from qwen3_next.config import Qwen3NextConfig

_CLASSES = {
    AutoModel: model.Qwen3NextModel,
    AutoModelForCausalLM: model.Qwen3NextForCausalLM,
    AutoModelForSequenceClassification: model.Qwen3NextForSequenceClassification,
    AutoModelForTokenClassification: model.Qwen3NextForTokenClassification,
    AutoModelForQuestionAnswering: model.Qwen3NextForQuestionAnswering,
}


def register() -> None:
    """From now on `AutoConfig`, `AutoModel` and `AutoModelFor*` return this package's classes for "qwen3_next".

    Calling it again changes nothing. It is a call and not an effect of the import, so that a program can compare both
    implementations.
    """
    AutoConfig.register(Qwen3NextConfig.model_type, Qwen3NextConfig, exist_ok=True)
    for auto_class, model_class in _CLASSES.items():
        auto_class.register(Qwen3NextConfig, model_class, exist_ok=True)

"""The network as modules whose parameter names are the checkpoint's names."""

from qwen3_next.model.heads import (
    Drafts,
    PackedLosses,
    Qwen3NextCausalLMOutput,
    Qwen3NextForCausalLM,
    Qwen3NextForQuestionAnswering,
    Qwen3NextForSequenceClassification,
    Qwen3NextForTokenClassification,
)
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.network import PackedOutput, Qwen3NextModel
from qwen3_next.model.pretrained import Qwen3NextPreTrainedModel

__all__ = [
    "Drafts",
    "PackedInputs",
    "PackedLosses",
    "PackedOutput",
    "Qwen3NextCausalLMOutput",
    "Qwen3NextForCausalLM",
    "Qwen3NextForQuestionAnswering",
    "Qwen3NextForSequenceClassification",
    "Qwen3NextForTokenClassification",
    "Qwen3NextModel",
    "Qwen3NextPreTrainedModel",
]

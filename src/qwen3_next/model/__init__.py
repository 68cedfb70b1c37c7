"""The network as modules whose parameter names are the checkpoint's names.

The names below are imported when they are first asked for: most of them need transformers' model classes, whose import
takes seconds that `qwen3_next.model.bare` saves.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from qwen3_next.model.packed_cache import PackedCache, PackedMemory
    from qwen3_next.model.parallel import parallelize_
    from qwen3_next.model.pretrained import Qwen3NextPreTrainedModel
    from qwen3_next.model.quantize import quantize_

_DEFINED_IN = {
    "PackedCache": "packed_cache",
    "PackedMemory": "packed_cache",
    "PackedInputs": "inputs",
    "PackedOutput": "network",
    "Qwen3NextModel": "network",
    "parallelize_": "parallel",
    "Qwen3NextPreTrainedModel": "pretrained",
    "quantize_": "quantize",
}

__all__ = [
    "Drafts",
    "PackedCache",
    "PackedInputs",
    "PackedLosses",
    "PackedMemory",
    "PackedOutput",
    "Qwen3NextCausalLMOutput",
    "Qwen3NextForCausalLM",
    "Qwen3NextForQuestionAnswering",
    "Qwen3NextForSequenceClassification",
    "Qwen3NextForTokenClassification",
    "Qwen3NextModel",
    "Qwen3NextPreTrainedModel",
    "parallelize_",
    "quantize_",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_DEFINED_IN.get(name, 'heads')}"), name)


def __dir__() -> list[str]:
    return __all__

"""The values of a config.json that cannot be served, each refused by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from qwen3_next.config_rope import refuse

if TYPE_CHECKING:
    from qwen3_next.config import Qwen3NextConfig

__all__ = [
    "accept_checkpoint_quantization",
    "validate_dtype",
    "validate_fields",
    "validate_labels",
    "validate_sizes",
]

LAYER_TYPES = ("linear_attention", "full_attention")
ACTIVATIONS = ("silu", "swish")  # two names of one function
DTYPES = ("bfloat16", "float16", "float32", "float64")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "decoder_sparse_step",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "num_mtp_steps",
)
COUNTS = ("num_experts", "num_experts_per_tok", "num_nextn_predict_layers")
SWITCHES = ("use_cache", "tie_word_embeddings", "attention_bias", "norm_topk_prob", "output_router_logits")
WEIGHTS = ("initializer_range", "router_aux_loss_coef", "mtp_loss_weight")


def validate_sizes(config: Qwen3NextConfig) -> None:
    """Check what everything else is derived from: sizes are positive integers, counts not negative, lists lists."""
    for names, least, allowed in ((SIZES, 1, "a positive integer"), (COUNTS, 0, "an integer of at least 0")):
        for name in names:
            value = getattr(config, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                refuse(name, value, allowed, "Correct the value or leave it out for the default.")
    for name in ("layer_types", "mlp_only_layers"):
        value: object = getattr(config, name)
        if value is not None and not isinstance(value, list | tuple):
            refuse(name, value, "a list or null", "Correct the value or leave it out for the default.")


def validate_fields(config: Qwen3NextConfig) -> None:
    """Check the fields of a complete config against each other and against what this package serves."""
    _validate_numbers(config)
    _validate_layers(config)
    _validate_heads(config)
    _validate_experts(config)
    if config.hidden_act not in ACTIVATIONS:
        refuse("hidden_act", config.hidden_act, " or ".join(map(repr, ACTIVATIONS)), "The published model uses 'silu'.")
    if getattr(config, "use_sliding_window", False):
        refuse("use_sliding_window", True, "false", "Qwen3-Next attends to the whole context: set it to false.")
    _validate_special_tokens(config)
    if config.num_nextn_predict_layers > 1:
        refuse(
            "num_nextn_predict_layers",
            config.num_nextn_predict_layers,
            "0 or 1",
            "One MTP layer serves every depth: train several steps of it with num_mtp_steps.",
        )
    if config.is_heterogeneous:
        refuse(
            "per_layer_config", "...", "null", "The layers differ only by layer_types and mlp_only_layers: remove it."
        )


def validate_dtype(dtype: Any) -> None:
    """Check the dtype in which a config asks for its weights: a torch dtype, its name, or None."""
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        refuse("dtype", dtype, ", ".join(DTYPES), "The published checkpoints are bfloat16; fp8 ones are dequantised.")


def accept_checkpoint_quantization(fields: dict[str, Any]) -> None:
    """Take the `quantization_config` of a block-fp8 checkpoint out of `fields`.

    Its weights are dequantised while they are loaded, so neither the model in memory nor a config saved from it is
    quantised. Any other method is refused. An object, not a dictionary, is a user's request to quantise while
    loading; that is transformers' to serve and stays.
    """
    quantization = fields.get("quantization_config")
    if callable(getattr(quantization, "to_dict", None)):
        return
    fields.pop("quantization_config", None)
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        refuse("quantization_config", quantization, "a dictionary or null", "Leave it out for bfloat16 weights.")
    if not quantization:
        return
    served = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
    required = ("quant_method", "weight_block_size")
    for name, value in served.items():
        found = quantization.get(name, None if name in required else value)
        if (list(found) if isinstance(found, tuple) else found) != value:
            refuse(
                f"quantization_config.{name}",
                found,
                f"{value!r}, the published block-fp8 format",
                "Load the bfloat16 or the published FP8 checkpoint instead.",
            )


def validate_labels(fields: dict[str, Any], id2label: Any) -> None:
    """Check what transformers makes the labels of a classifier from: `num_labels` among `fields`, and `id2label`."""
    if id2label is not None and not isinstance(id2label, dict):
        refuse("id2label", id2label, "a dictionary of numbers and names, or null", "Give num_labels alone.")
    count = fields.get("num_labels")
    if "num_labels" not in fields or (count is None and id2label is not None):
        return
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        refuse("num_labels", count, "a positive integer", "Leave it out for two labels.")


def _validate_special_tokens(config: Qwen3NextConfig) -> None:
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value: object = getattr(config, name)
        several = name == "eos_token_id" and isinstance(value, list | tuple)
        for token in cast(Sequence[object], value if several else [] if value is None else [value]):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < config.vocab_size:
                kind = "a token or a list of tokens" if name == "eos_token_id" else "a token"
                refuse(
                    name,
                    value,
                    f"null, or {kind} from 0 to vocab_size - 1 = {config.vocab_size - 1}",
                    "Leave it out when the tokenizer has none, or correct vocab_size.",
                )


def _validate_numbers(config: Qwen3NextConfig) -> None:
    for name in SWITCHES:
        if not isinstance(getattr(config, name), bool):
            refuse(name, getattr(config, name), "true or false", "Correct the value or leave it out.")
    for name in WEIGHTS:
        if not _is_number(getattr(config, name)) or getattr(config, name) < 0:
            refuse(name, getattr(config, name), "a finite number of at least 0", "Correct the value or leave it out.")
    if not _is_number(config.rms_norm_eps) or config.rms_norm_eps <= 0:
        refuse("rms_norm_eps", config.rms_norm_eps, "a finite number above 0", "Published: 1e-06.")
    if not _is_number(config.attention_dropout) or not 0 <= config.attention_dropout < 1:
        refuse("attention_dropout", config.attention_dropout, "at least 0 and below 1", "Published: 0.0.")


def _validate_layers(config: Qwen3NextConfig) -> None:
    for kind in config.layer_types:
        if kind not in LAYER_TYPES:
            refuse("layer_types", kind, " or ".join(map(repr, LAYER_TYPES)), "Correct the entry.")
    if len(config.layer_types) != config.num_hidden_layers:
        refuse(
            "layer_types",
            config.layer_types,
            f"num_hidden_layers = {config.num_hidden_layers} entries, not {len(config.layer_types)}",
            "Change one of the two, or leave layer_types out for the regular pattern.",
        )
    for layer in config.mlp_only_layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < config.num_hidden_layers:  # pyright: ignore[reportUnnecessaryIsInstance]
            refuse("mlp_only_layers", layer, f"layers 0 to {config.num_hidden_layers - 1}", "Remove the entry.")
    if config.linear_conv_kernel_dim < 2:
        refuse("linear_conv_kernel_dim", config.linear_conv_kernel_dim, "at least 2 taps", "Published: 4.")


def _validate_heads(config: Qwen3NextConfig) -> None:
    for heads, groups in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if getattr(config, heads) % getattr(config, groups):
            refuse(
                heads,
                getattr(config, heads),
                f"a multiple of {groups} = {getattr(config, groups)}",
                f"Each of the {groups} serves the same number of heads: change one of the two.",
            )


def _validate_experts(config: Qwen3NextConfig) -> None:
    if config.num_experts > 0 and not 1 <= config.num_experts_per_tok <= config.num_experts:
        refuse(
            "num_experts_per_tok",
            config.num_experts_per_tok,
            f"1 to num_experts = {config.num_experts}",
            "Change one of the two; num_experts = 0 makes every layer dense.",
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

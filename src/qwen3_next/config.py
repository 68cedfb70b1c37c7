"""Qwen3NextConfig: config.json <-> fields, what follows from them, and the values that are refused."""

import copy
from dataclasses import field
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from qwen3_next.config_checks import (
    accept_checkpoint_quantization,
    validate_dtype,
    validate_fields,
    validate_labels,
    validate_sizes,
)
from qwen3_next.config_figures import Figures
from qwen3_next.config_rope import read_rope, refuse, replace_rope, rope_scaling_of, validate_rope_parameters

__all__ = ["Qwen3NextConfig"]

LINEAR_ATTENTION = "linear_attention"
FULL_ATTENTION = "full_attention"
DEFAULT_FULL_ATTENTION_INTERVAL = 4
# Names that config.json may use beside the fields of the class.
OTHER_SPELLINGS = (
    "rope_scaling",
    "rope_theta",
    "partial_rotary_factor",
    "full_attention_interval",
    "dtype",
    "torch_dtype",
)


class Qwen3NextConfig(PreTrainedConfig):
    """Everything that config.json says about a Qwen3-Next model, under transformers' field names and defaults.

    Reads the published file and the spellings of transformers 4.57 and 5.x; `to_dict`, `to_json_string` and
    `save_pretrained` write both spellings and every field, so that no reader falls back to a default of its own.
    `rope_parameters` is always complete (`rope_type`, `rope_theta`, `partial_rotary_factor`, scaling fields).

    Attributes:
        vocab_size: V, rows of the embedding and of the head.
        hidden_size: D, width of the residual stream.
        intermediate_size: width of a dense MLP; used only by layers that `is_sparse_layer` denies.
        num_hidden_layers: layers of the main model, the MTP layers not counted.
        num_attention_heads: H, query heads of a full-attention layer.
        num_key_value_heads: Hkv, its key/value heads; divides H.
        head_dim: Dh, width of each of them.
        linear_num_key_heads, linear_num_value_heads: Hk and Hv of a Gated DeltaNet layer; Hk divides Hv.
        linear_key_head_dim, linear_value_head_dim: Dk and Dv, the widths of those heads.
        linear_conv_kernel_dim: W, taps of the causal convolution.
        num_experts, num_experts_per_tok: E and K; with E = 0 every layer is dense.
        moe_intermediate_size, shared_expert_intermediate_size: F, and the width of the shared expert.
        mlp_only_layers, decoder_sparse_step: which layers are dense, see `is_sparse_layer`.
        layer_types: "linear_attention" or "full_attention" for each layer. Left out, every
            `full_attention_interval`-th layer (default 4) is full attention.
        rope_parameters: the rotary embedding; served types are "default", "linear", "dynamic" and "yarn". "dynamic"
            takes its frequencies from the longest position of a call, so packed sequences give what each gives alone
            only up to the trained length, `max_position_embeddings`.
        num_nextn_predict_layers: layers of the multi-token-prediction module; 0 means that the checkpoint has none.
        num_mtp_steps: chained MTP steps that training unrolls.
        mtp_loss_weight: weight of the MTP loss in the training loss.
        router_aux_loss_coef: weight of the load-balancing loss.

    Raises:
        ConfigError: a value that cannot be served; the message names the field, the value and the remedy.
    """

    model_type = "qwen3_next"
    # What `Trainer` leaves out of predictions: they are the logits alone. A class attribute by transformers' protocol.
    keys_to_ignore_at_inference = ["past_key_values", "lm_loss", "mtp_loss", "aux_loss"]  # noqa: RUF012

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    attention_bias: bool = False
    attention_dropout: float = 0.0
    head_dim: int = 256
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128
    linear_value_head_dim: int = 128
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 512
    num_experts_per_tok: int = 10
    num_experts: int = 512
    norm_topk_prob: bool = True
    output_router_logits: bool = False
    router_aux_loss_coef: float = 0.001
    mlp_only_layers: list[int] = field(default_factory=list[int])
    layer_types: list[str] = field(default_factory=list[str])
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    num_nextn_predict_layers: int = 1
    num_mtp_steps: int = 1
    mtp_loss_weight: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        """Complete the fields from every accepted spelling, then refuse what cannot be served."""
        validate_sizes(self)
        validate_dtype(self.dtype if self.dtype is not None else kwargs.get("torch_dtype"))
        validate_labels(kwargs, self.id2label)
        accept_checkpoint_quantization(kwargs)
        self.mlp_only_layers = list(self.mlp_only_layers or [])
        interval = kwargs.pop("full_attention_interval", None)
        self.layer_types = list(self.layer_types or layer_types_of(self.num_hidden_layers, interval))
        if interval is not None and self.layer_types != layer_types_of(self.num_hidden_layers, interval):
            refuse(
                "full_attention_interval", interval, f"what layer_types = {self.layer_types} says", "Keep one of them."
            )
        kwargs["rope_parameters"] = self.rope_parameters
        self.rope_parameters = read_rope(kwargs, self.max_position_embeddings)
        super().__post_init__(**kwargs)
        self._post_init_done = True
        self.validate()

    def __setattr__(self, key: str, value: Any) -> None:
        """Set an attribute; the rotary spellings assigned after construction keep `rope_parameters` complete."""
        if key in ("rope_parameters", "rope_scaling") and self.__dict__.get("_post_init_done", False):
            key, value = (
                "rope_parameters",
                replace_rope(self.rope_parameters, {key: value}, self.max_position_embeddings),
            )
        super().__setattr__(key, value)

    def validate(self) -> None:
        """Refuse every value that cannot be served. Runs at construction and before saving.

        Raises:
            ConfigError: the message names the field, the value found, what is allowed and the remedy.
        """
        validate_sizes(self)
        validate_fields(self)
        validate_rope_parameters(self.rope_parameters, self.head_dim)
        # transformers' own checks; its decorator adds the method where type checkers do not see it.
        PreTrainedConfig.validate(self)  # pyright: ignore[reportAttributeAccessIssue]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a config from a config.json's dictionary; keyword arguments override its fields and are validated too.

        Returns:
            The config, or `(config, unused keyword arguments)` with `return_unused_kwargs=True`.
        """
        names = {*Qwen3NextConfig.__annotations__, *OTHER_SPELLINGS}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        merged = override_fields(copy.deepcopy(config_dict), overrides)
        return super().from_dict(merged, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return every field, in the spellings of transformers 4.57 and of 5.x at once."""
        written = super().to_dict()
        written.pop("_post_init_done", None)
        written["rope_theta"] = self.rope_theta
        written["partial_rotary_factor"] = self.partial_rotary_factor
        written["rope_scaling"] = rope_scaling_of(self.rope_parameters)
        if self.full_attention_interval is not None:
            written["full_attention_interval"] = self.full_attention_interval
        if written.get("dtype") is not None:
            written["torch_dtype"] = written["dtype"]
        return written

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what is written to config.json: all fields of this class, and what differs of the base class's."""
        common = PreTrainedConfig().to_dict()
        always = {*Qwen3NextConfig.__annotations__, "transformers_version"}
        return {
            name: value
            for name, value in self.to_dict().items()
            if name != "_name_or_path" and (name in always or name not in common or value != common[name])
        }

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies (`rope_parameters["rope_theta"]`)."""
        return self.rope_parameters["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters["rope_theta"] = value

    @property
    def partial_rotary_factor(self) -> float:
        """Fraction of each head that is rotated (`rope_parameters["partial_rotary_factor"]`)."""
        return self.rope_parameters["partial_rotary_factor"]

    @partial_rotary_factor.setter
    def partial_rotary_factor(self, value: float) -> None:
        self.rope_parameters["partial_rotary_factor"] = value

    @property
    def full_attention_interval(self) -> int | None:
        """The k for which exactly every k-th layer is full attention, or None when `layer_types` is irregular."""
        full = [i for i, kind in enumerate(self.layer_types) if kind == FULL_ATTENTION]
        interval = full[0] + 1 if full else max(DEFAULT_FULL_ATTENTION_INTERVAL, len(self.layer_types) + 1)
        return interval if self.layer_types == layer_types_of(len(self.layer_types), interval) else None

    @full_attention_interval.setter
    def full_attention_interval(self, value: int) -> None:
        self.layer_types = layer_types_of(self.num_hidden_layers, value)

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of each head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def linear_key_dim(self) -> int:
        """Hk * Dk: width of all DeltaNet keys, and of all its queries."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_dim(self) -> int:
        """Hv * Dv: width of all DeltaNet values."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_conv_dim(self) -> int:
        """C: channels of the causal convolution, all queries, keys and values."""
        return 2 * self.linear_key_dim + self.linear_value_dim

    def context_length(self) -> int:
        """Tokens that the rotary embedding serves: at least `max_position_embeddings`.

        A scaled type reaches `factor` times the length trained, which only "yarn" states for itself
        (`original_max_position_embeddings`); of "linear" and "dynamic" it is `max_position_embeddings`.
        """
        rope, stated = self.rope_parameters, self.max_position_embeddings
        trained = rope.get("original_max_position_embeddings", stated)
        return max(stated, int(rope.get("factor", 1) * trained))

    def is_full_attention_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) mixes by attention; otherwise by the gated delta rule."""
        return self.layer_types[layer] == FULL_ATTENTION

    def is_sparse_layer(self, layer: int) -> bool:
        """Whether layer `layer` (from 0) is a mixture of experts; otherwise it is a dense MLP."""
        return (
            self.num_experts > 0 and layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0
        )

    def parameter_count(self) -> int:
        """Number of parameters, the MTP module included, tied embeddings counted once."""
        return Figures(self).main.parameters + Figures(self).mtp.parameters

    def mtp_parameter_count(self) -> int:
        """Number of parameters of the MTP module: 0 without one. Its embedding and head are the main model's."""
        return Figures(self).mtp.parameters

    def active_parameter_count(self, *, include_embeddings: bool = True) -> int:
        """Number of parameters that one token meets in the main model: K of the E routed experts, all else.

        Args:
            include_embeddings: count the embedding and the head.
        """
        return Figures(self).active_parameters(include_embeddings)

    def weight_bytes(self, dtype: torch.dtype | Literal["fp8"] = torch.bfloat16) -> int:
        """Bytes of all weights, MTP included, when every tensor is stored in `dtype`.

        Args:
            dtype: a torch dtype, or "fp8" for the published block format: one byte for each weight of a large
                projection and a bf16 scale for each 128 x 128 block of it; everything else in bf16.
        """
        parts = (Figures(self).main, Figures(self).mtp)
        if dtype == "fp8":
            return sum(part.block_fp8_bytes for part in parts)
        return sum(part.parameters for part in parts) * dtype.itemsize

    def kv_bytes_per_token(self, dtype: torch.dtype = torch.bfloat16, *, include_mtp: bool = False) -> int:
        """Bytes that one token adds to the key/value cache of all full-attention layers.

        Args:
            dtype: of the cache.
            include_mtp: count the cache of the MTP layers too.
        """
        layers = self.layer_types.count(FULL_ATTENTION) + (self.num_nextn_predict_layers if include_mtp else 0)
        return layers * 2 * self.num_key_value_heads * self.head_dim * dtype.itemsize

    def state_bytes_per_sequence(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of one sequence's state in all DeltaNet layers, however long the sequence.

        The recurrent state [Hv, Dk, Dv] is fp32; the convolution's last W - 1 inputs [C, W - 1] are in `dtype`.
        """
        recurrent = self.linear_value_dim * self.linear_key_head_dim * torch.float32.itemsize
        convolution = self.linear_conv_dim * (self.linear_conv_kernel_dim - 1) * dtype.itemsize
        return self.layer_types.count(LINEAR_ATTENTION) * (recurrent + convolution)


def layer_types_of(num_layers: int, interval: int | None) -> list[str]:
    """Return the regular pattern: every `interval`-th layer is full attention (None: every fourth)."""
    interval = DEFAULT_FULL_ATTENTION_INTERVAL if interval is None else interval
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        refuse("full_attention_interval", interval, "a positive integer", "Published: 4.")
    return [LINEAR_ATTENTION if (i + 1) % interval else FULL_ATTENTION for i in range(num_layers)]


def override_fields(fields: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `fields` (a config.json, changed in place) with `overrides` applied in whichever spelling they come."""
    if "layer_types" not in overrides and overrides.keys() & {"num_hidden_layers", "full_attention_interval"}:
        # A stored regular pattern is derived anew; an irregular one has no interval and has to be given again.
        if "full_attention_interval" in fields or "full_attention_interval" in overrides:
            fields.pop("layer_types", None)
    elif "layer_types" in overrides:
        fields.pop("full_attention_interval", None)
    rope = {name: overrides[name] for name in overrides if name.startswith("rope_") or name == "partial_rotary_factor"}
    dtypes = [overrides[name] for name in ("dtype", "torch_dtype") if overrides.get(name) not in (None, "auto")]
    fields.update({name: value for name, value in overrides.items() if name not in (*rope, "dtype", "torch_dtype")})
    if dtypes:
        fields.update(dtype=dtypes[0], torch_dtype=None)
    if rope:
        length = fields.get("max_position_embeddings", Qwen3NextConfig.max_position_embeddings)
        fields["rope_parameters"] = replace_rope(read_rope(fields, length), rope, length)
    return fields

"""The small modules: linear layers, norms, the convolution of a DeltaNet layer, dense SwiGLU, the rotary tables."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.config_rope import require_served_rope_type
from qwen3_next.ops.causal_conv import ConvOutput, ProjectionColumns, causal_conv
from qwen3_next.ops.gate import swiglu
from qwen3_next.ops.linear import linear
from qwen3_next.ops.norm import AddedNorm, add_rms_norm, gated_rms_norm, rms_norm
from qwen3_next.ops.rotary import (
    YarnScaling,
    rms_norm_rotary,
    rotary_frequencies,
    rotary_tables,
    stretched_theta,
    yarn_attention_factor,
)
from qwen3_next.ops.segments import Segments

RotaryTables = tuple[Float[Tensor, "T 1 R"], Float[Tensor, "T 1 R"]]


class Linear(nn.Linear):
    """A linear layer whose weight may be block-fp8, as in the published fp8 checkpoints.

    `weight_scale_inv` holds the scales of an e4m3 weight, see `quantize_`; None beside an ordinary one.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)
        self.weight_scale_inv: Float[Tensor, "OB IB"] | None = None

    def forward(self, input: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """`weight input + bias` for every row of `input`, which torch named."""
        return linear(input, self.weight, self.weight_scale_inv, self.bias)

    @property
    def is_plain(self) -> bool:
        """Whether a call is a product with the weight and nothing else: no hook acts, as those of offloading do."""
        hooks = self._forward_hooks or self._forward_pre_hooks or self._backward_hooks or self._backward_pre_hooks
        return not hooks and "forward" not in vars(self)


class ZeroCentredNorm(nn.Module):
    """What the RMS norms below share: the scale is `1 + weight`, so weight decay pulls it towards 1."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RMSNorm(ZeroCentredNorm):
    """The norm of each token."""

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The normed and scaled `x`, in its dtype."""
        return rms_norm(x, self.weight, self.eps)


class AddRMSNorm(ZeroCentredNorm):
    """The norm of a residual stream to which something is added first."""

    def forward(self, x: Float[Tensor, "*B D"], update: Float[Tensor, "*B D"]) -> AddedNorm:
        """The normed sum, and the sum itself."""
        return add_rms_norm(x, update, self.weight, self.eps)


class RotaryRMSNorm(ZeroCentredNorm):
    """The norm of each query or key head, and the rotation after it."""

    def forward(self, x: Float[Tensor, "T H Dh"], rotary: RotaryTables) -> Float[Tensor, "T H Dh"]:
        """The normed heads, turned to their positions."""
        return rms_norm_rotary(x, self.weight, self.eps, *rotary)


class GatedRMSNorm(nn.Module):
    """RMS norm of each head with a plain weight, then a SiLU gate."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*B Dv"], gate: Float[Tensor, "*B Dv"]) -> Float[Tensor, "*B Dv"]:
        """The normed, scaled and gated `x`, in its dtype."""
        return gated_rms_norm(x, gate, self.weight, self.eps)


class CausalConvolution(nn.Module):
    """Depthwise causal convolution and SiLU along each packed sequence, of some columns of a projection."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))

    def forward(
        self,
        x: Float[Tensor, "T P"],
        segments: Segments,
        state: Float[Tensor, "N C W-1"] | None,
        columns: ProjectionColumns,
    ) -> ConvOutput:
        """The convolved tokens, and the inputs that the next call needs; `state` is what an earlier one left."""
        return causal_conv(x, self.weight[:, 0], segments, state, columns)


class DenseMLP(nn.Module):
    """`down(silu(gate x) * up x)`: a dense layer, and the shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """What the layer adds to the residual stream."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class RotaryEmbedding(nn.Module):
    """cos and sin for the positions of a forward pass; holds no parameter.

    With rope type "dynamic" the frequencies follow the longest position of the call, once it is beyond the trained
    length, and all sequences of the call share them. So a sequence packed with others gets what it gets alone only
    while none of them is longer than the model was trained for. Keys cached by earlier calls keep their rotation.
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.config = config
        frequencies, self.attention_factor = rotary_settings(config)
        self.inv_freq = nn.Buffer(frequencies, persistent=False)

    def forward(self, x: Tensor, position_ids: Int[Tensor, "*T"]) -> RotaryTables:
        """The tables `[*T, 1, R]` of the positions, in the dtype of `x`."""
        frequencies = self._frequencies(position_ids).to(position_ids.device)
        return rotary_tables(position_ids, frequencies, self.attention_factor, x.dtype)

    def _frequencies(self, position_ids: Int[Tensor, "*T"]) -> Float[Tensor, "R"]:
        settings, trained = self.config.rope_parameters, self.config.max_position_embeddings
        length = int(position_ids.max()) + 1 if settings["rope_type"] == "dynamic" and position_ids.numel() else 0
        if length <= trained:
            return self.inv_freq.float()
        width = self.config.rotary_dim
        return rotary_frequencies(
            width, stretched_theta(settings["rope_theta"], width, settings["factor"], length, trained)
        )


def rotary_settings(config: Qwen3NextConfig) -> tuple[Float[Tensor, "R"], float]:
    """The frequencies of a configuration and the factor on cos and sin."""
    settings = config.rope_parameters
    require_served_rope_type(settings["rope_type"])
    linear = settings["factor"] if settings["rope_type"] == "linear" else 1.0
    yarn = _yarn_scaling(config) if settings["rope_type"] == "yarn" else None
    frequencies = rotary_frequencies(config.rotary_dim, settings["rope_theta"], linear, yarn)
    return frequencies, yarn_attention_factor(yarn)


def _yarn_scaling(config: Qwen3NextConfig) -> YarnScaling:
    settings = config.rope_parameters
    return YarnScaling(
        factor=settings["factor"],
        original_length=settings.get("original_max_position_embeddings") or config.max_position_embeddings,
        beta_fast=settings.get("beta_fast") or 32.0,
        beta_slow=settings.get("beta_slow") or 1.0,
        attention_factor=settings.get("attention_factor"),
        mscale=settings.get("mscale", YarnScaling.mscale),
        mscale_all_dim=settings.get("mscale_all_dim", YarnScaling.mscale_all_dim),
        truncate=settings.get("truncate", True),
    )

"""One decoder layer."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.model.attention import GatedAttention
from qwen3_next.model.cache import ModelCache
from qwen3_next.model.delta_net import GatedDeltaNet
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.layers import DenseMLP, RMSNorm, RotaryTables
from qwen3_next.model.moe import SparseMoE
from qwen3_next.ops.routing import Routing


class LayerOutput(NamedTuple):
    """The residual stream after a layer, its attention weights where wanted, and the routing of its experts.

    Flat, because activation checkpointing follows the gradients of the tensors in a tuple but not of what these hold.
    The last four are those of `Routing`; None in a dense layer.
    """

    hidden: Float[Tensor, "T D"]
    attention_weights: Float[Tensor, "B H S past_plus_S"] | None
    router_logits: Float[Tensor, "T E"] | None = None
    router_probabilities: Float[Tensor, "T E"] | None = None
    expert_weights: Float[Tensor, "T K"] | None = None
    experts: Int[Tensor, "T K"] | None = None

    @property
    def routing(self) -> Routing | None:
        """Where each token went; None in a dense layer."""
        logits, probabilities, weights, experts = self[2:]
        if logits is None or probabilities is None or weights is None or experts is None:
            return None
        return Routing(logits, probabilities, weights, experts)


class DecoderLayer(nn.Module):
    """Mix along the sequence, then along the channels; each is added to the residual stream.

    The mixer is `linear_attn` (Gated DeltaNet) or `self_attn` (gated attention), by the layer's type.
    """

    def __init__(self, config: Qwen3NextConfig, layer_type: str, index: int, sparse: bool) -> None:
        super().__init__()
        self.index, self.layer_type = index, layer_type
        if layer_type == "linear_attention":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = GatedAttention(config)
        self.mlp = SparseMoE(config) if sparse else DenseMLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        inputs: PackedInputs,
        rotary: RotaryTables,
        cache: ModelCache | None = None,
        *,
        want_weights: bool = False,
        experts: Int[Tensor, "T K"] | None = None,
    ) -> LayerOutput:
        """`experts` repeats the routing of an earlier pass over the same tokens."""
        inputs = inputs.to(x.device)
        mixed, weights = self._mix(self.input_layernorm(x), inputs, rotary, cache, want_weights)
        x = x + mixed
        update, routing = self.transform_channels(x, experts)
        if routing is None:
            return LayerOutput(x + update, weights)
        return LayerOutput(x + update, weights, routing.logits, routing.probabilities, routing.weights, routing.experts)

    def _mix(
        self, x: Tensor, inputs: PackedInputs, rotary: RotaryTables, cache: ModelCache | None, want_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        if self.layer_type == "linear_attention":
            return self.linear_attn(x, inputs, None if cache is None else cache.delta_net(self.index)), None
        layer_cache = None if cache is None else cache.attention(self.index)
        return self.self_attn(x, inputs, rotary, layer_cache, want_weights)

    def transform_channels(
        self, x: Float[Tensor, "T D"], experts: Int[Tensor, "T K"] | None = None
    ) -> tuple[Float[Tensor, "T D"], Routing | None]:
        """The update of the channel mixer (experts or dense) for the residual stream `x`."""
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, SparseMoE):
            return self.mlp(normed, experts)
        return self.mlp(normed), None

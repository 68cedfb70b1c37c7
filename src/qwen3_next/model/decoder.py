"""One decoder layer, and how it is run with or without keeping its activations."""

from collections.abc import Callable
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
from qwen3_next.ops.experts import Routing


class LayerOutput(NamedTuple):
    """The residual stream after a layer, the routing of its experts and, where wanted, its attention weights."""

    hidden: Float[Tensor, "T D"]
    routing: Routing | None
    attention_weights: Tensor | None


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
        return LayerOutput(x + update, routing, weights)

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


class RecomputedLayer:
    """A layer whose activations are dropped after the forward pass and computed again in the backward pass.

    The first pass remembers which experts each token went to and the second repeats that choice: rounding that differs
    between the passes would otherwise send a token elsewhere and make its gradient wrong.
    """

    def __init__(self, layer: DecoderLayer, inputs: PackedInputs, rotary: RotaryTables) -> None:
        self.layer, self.inputs, self.rotary = layer, inputs, rotary
        self.experts: Int[Tensor, "T K"] | None = None

    def __call__(self, x: Float[Tensor, "T D"]) -> tuple[Tensor, ...]:
        output = self.layer(x, self.inputs, self.rotary, experts=self.experts)
        if output.routing is None:
            return (output.hidden,)
        self.experts = output.routing.experts
        routing = output.routing
        return output.hidden, routing.logits, routing.probabilities, routing.weights, routing.experts

    def run(self, checkpoint: Callable[..., tuple[Tensor, ...]], x: Float[Tensor, "T D"]) -> LayerOutput:
        """Run through `checkpoint(function, x)`."""
        hidden, *routing = checkpoint(self, x)
        return LayerOutput(hidden, Routing(*routing) if routing else None, None)

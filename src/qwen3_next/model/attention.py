"""Gated attention: grouped queries, normed and partly rotated, with a sigmoid gate on what comes out."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.errors import InputError
from qwen3_next.model.cache import AttentionCache, CachedKeys
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.layers import Linear, RotaryRMSNorm, RotaryTables
from qwen3_next.ops.attention import attention, attention_with_weights, cached_attention, chained_attention
from qwen3_next.ops.gate import sigmoid_gate
from qwen3_next.ops.paged_attention import paged_attention
from qwen3_next.ops.pages import KeyPages, write_pages_


class Projections(NamedTuple):
    """Queries and keys after norm and rotation, values and gate as projected."""

    q: Float[Tensor, "T H Dh"]
    k: Float[Tensor, "T Hkv Dh"]
    v: Float[Tensor, "T Hkv Dh"]
    gate: Float[Tensor, "T H Dh"]


class GatedAttention(nn.Module):
    """`o_proj(attention(q, k, v) * sigmoid(gate))`, the gate projected from the layer's input beside the query.

    The gate removes attention sinks and lets the model train at larger learning rates (Qiu et al. 2025,
    arXiv:2505.06708, variant G1). Only the first quarter of each head is rotated.
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.config = config
        width, self.head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = (n * self.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        bias = config.attention_bias
        self.q_proj = Linear(width, 2 * q_size, bias=bias)
        self.k_proj = Linear(width, kv_size, bias=bias)
        self.v_proj = Linear(width, kv_size, bias=bias)
        self.o_proj = Linear(q_size, width, bias=bias)
        self.q_norm = RotaryRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RotaryRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        inputs: PackedInputs,
        rotary: RotaryTables,
        cache: AttentionCache | KeyPages | None,
        want_weights: bool = False,
    ) -> tuple[Float[Tensor, "T D"], Float[Tensor, "B H S past_plus_S"] | None]:
        """The mixed tokens and, where wanted, the attention probabilities of the padded rows."""
        p = self.project(x, rotary)
        if isinstance(cache, KeyPages):
            return self._attend_pages(p, inputs, cache, want_weights), None
        cached = None if cache is None else cache.append(p.k, p.v)
        if want_weights or self.config._attn_implementation == "eager":
            mixed, weights = self._attend_rows_eagerly(p, inputs, cached)
            return self.gate_and_project(mixed, p.gate), weights
        if cached is None or (cache is not None and cache.is_empty):
            mixed = attention(p.q, p.k, p.v, inputs.segments, inputs.segments, self._dropout())
        else:
            mixed = self._attend_cache(p.q, inputs, cached)
        return self.gate_and_project(mixed, p.gate), None

    def project(self, x: Float[Tensor, "T D"], rotary: RotaryTables) -> Projections:
        """Each head of `q_proj` is [query | gate]; the gate gets neither norm nor rotation."""
        heads = (self.config.num_attention_heads, 2 * self.head_dim)
        kv_heads = (self.config.num_key_value_heads, self.head_dim)
        q, gate = self.q_proj(x).unflatten(-1, heads).chunk(2, dim=-1)
        k, v = (projected.unflatten(-1, kv_heads) for projected in (self.k_proj(x), self.v_proj(x)))
        return Projections(self.q_norm(q, rotary), self.k_norm(k, rotary), v, gate)

    def gate_and_project(self, mixed: Float[Tensor, "T H Dh"], gate: Float[Tensor, "T H Dh"]) -> Float[Tensor, "T D"]:
        """What the layer adds to the residual stream."""
        return self.o_proj(sigmoid_gate(mixed, gate).flatten(1))

    def attend_chain(self, chain: list[Projections], inputs: PackedInputs) -> Float[Tensor, "T D"]:
        """The output of the last step of a draft chain that starts at every token (see `chained_attention`)."""
        last = chain[-1]
        if len(chain) == 1:
            mixed = attention(last.q, last.k, last.v, inputs.segments, inputs.segments, self._dropout())
            return self.gate_and_project(mixed, last.gate)
        keys, values = tuple(p.k for p in chain), tuple(p.v for p in chain)
        mixed = chained_attention(last.q, keys, values, inputs.segments, self._dropout())
        return self.gate_and_project(mixed, last.gate)

    def _attend_pages(
        self, p: Projections, inputs: PackedInputs, pages: KeyPages, want_weights: bool
    ) -> Float[Tensor, "T D"]:
        if want_weights:
            raise InputError("attention weights are not computed over pages; use a transformers cache, or none.")
        write_pages_(p.k, p.v, pages, inputs.segments)
        return self.o_proj(paged_attention(p.q, pages, inputs.segments, p.gate).flatten(1))

    def _attend_cache(self, q: Tensor, inputs: PackedInputs, cached: CachedKeys) -> Tensor:
        rows = inputs.row_view
        mixed = cached_attention(rows.unpack(q), *cached, self._dropout())
        return rows.pack(mixed)

    def _attend_rows_eagerly(
        self, p: Projections, inputs: PackedInputs, cached: CachedKeys | None
    ) -> tuple[Tensor, Tensor]:
        rows = inputs.row_view
        keys, values = (rows.unpack(p.k), rows.unpack(p.v)) if cached is None else (cached.keys, cached.values)
        mask = rows.visibility(p.q.device)
        mixed, weights = attention_with_weights(rows.unpack(p.q), keys, values, mask, self._dropout())
        return rows.pack(mixed), weights

    def _dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

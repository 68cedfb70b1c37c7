"""Gated DeltaNet: a linear-time mixer whose state is one matrix per head."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.model.cache import DeltaNetCache, DeltaNetState
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.layers import CausalConvolution, GatedRMSNorm
from qwen3_next.ops.gated_delta import gated_delta_rule


class Projections(NamedTuple):
    """What the two input projections hold, regrouped."""

    qkv: Float[Tensor, "T C"]
    z: Float[Tensor, "T Hk Hv/Hk Dv"]
    b: Float[Tensor, "T Hv"]
    a: Float[Tensor, "T Hv"]


class GatedDeltaNet(nn.Module):
    """Convolve q, k and v, run the gated delta rule, norm and gate each head, project back.

    `log_decay = -exp(A_log) softplus(a + dt_bias)` is how much a head forgets at a token, `beta = sigmoid(b)` how much
    of its error it corrects. (Yang et al. 2024, arXiv:2412.06464, section 3 and figure 1.)
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_width, self.value_width = config.linear_key_head_dim, config.linear_value_head_dim
        key_size, value_size = self.key_heads * self.key_width, self.value_heads * self.value_width
        self.in_proj_qkvz = nn.Linear(config.hidden_size, 2 * (key_size + value_size), bias=False)
        self.in_proj_ba = nn.Linear(config.hidden_size, 2 * self.value_heads, bias=False)
        self.conv1d = CausalConvolution(2 * key_size + value_size, config.linear_conv_kernel_dim)
        # Both steer an exponential: bf16 steps of A_log would move a decay by up to 3 %.
        self.A_log = nn.Parameter(torch.zeros(self.value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(self.value_width, config.rms_norm_eps)
        self.out_proj = nn.Linear(value_size, config.hidden_size, bias=False)

    def forward(
        self, x: Float[Tensor, "T D"], inputs: PackedInputs, cache: DeltaNetCache | None
    ) -> Float[Tensor, "T D"]:
        """The mixed tokens; the cache is read before and written after."""
        p = self._project(x)
        before = None if cache is None else cache.read()
        conv = self.conv1d(p.qkv, inputs.segments, None if before is None else before.conv)
        log_decay = -self.A_log.float().exp() * F.softplus(p.a + self.dt_bias.float())
        mixed = gated_delta_rule(
            *self._heads(conv.output),
            log_decay,
            p.b.sigmoid(),
            inputs.segments,
            None if before is None else before.recurrent,
        )
        if cache is not None:
            cache.write(DeltaNetState(conv.final_state, mixed.final_state))
        return self.out_proj(self.norm(mixed.output.view(p.z.shape), p.z).flatten(1))

    def _project(self, x: Float[Tensor, "T D"]) -> Projections:
        """The projections come grouped by key head: [q | k | v of its value heads | z of them], and [b | a]."""
        per_key = self.value_heads // self.key_heads
        values = per_key * self.value_width
        sizes = [self.key_width, self.key_width, values, values]
        q, k, v, z = self.in_proj_qkvz(x).unflatten(-1, (self.key_heads, sum(sizes))).split(sizes, dim=-1)
        b, a = self.in_proj_ba(x).unflatten(-1, (self.key_heads, 2 * per_key)).chunk(2, dim=-1)
        qkv = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=-1)
        z = z.unflatten(-1, (per_key, self.value_width))
        return Projections(qkv, z, b.float().flatten(1), a.float().flatten(1))

    def _heads(self, qkv: Float[Tensor, "T C"]) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.key_heads * self.key_width, self.value_heads * self.value_width
        q, k, v = qkv.split([keys, keys, values], dim=-1)
        key_shape, value_shape = (self.key_heads, self.key_width), (self.value_heads, self.value_width)
        return q.unflatten(-1, key_shape), k.unflatten(-1, key_shape), v.unflatten(-1, value_shape)

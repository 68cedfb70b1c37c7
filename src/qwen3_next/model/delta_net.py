"""Gated DeltaNet: a linear-time mixer whose state is one matrix per head."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from qwen3_next.config import Qwen3NextConfig
from qwen3_next.model.cache import DeltaNetCache, DeltaNetState, StateSlots
from qwen3_next.model.inputs import PackedInputs
from qwen3_next.model.layers import CausalConvolution, GatedRMSNorm, Linear
from qwen3_next.ops.causal_conv import ProjectionColumns, causal_conv_
from qwen3_next.ops.gated_delta import gated_delta_rule, gated_delta_rule_
from qwen3_next.ops.gated_delta_step import StepWeights, delta_net_step_
from qwen3_next.ops.segments import Segments

STEP_TOKENS = 8
"""Up to this many new tokens of each sequence go through the recurrence one by one; more of them in chunks."""


def columns_of(config: Qwen3NextConfig) -> ProjectionColumns:
    """How the rows of `in_proj_qkvz` are laid out."""
    return ProjectionColumns(
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )


class GatedDeltaNet(nn.Module):
    """Convolve q, k and v, run the gated delta rule, norm and gate each head, project back.

    `log_decay = -exp(A_log) softplus(a + dt_bias)` is how much a head forgets at a token, `beta = sigmoid(b)` how much
    of its error it corrects. (Yang et al. 2024, arXiv:2412.06464, section 3 and figure 1.)
    """

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__()
        self.columns = columns_of(config)
        value_heads, value_size = self.columns.value_heads, self.columns.value_heads * self.columns.value_width
        self.in_proj_qkvz = Linear(config.hidden_size, self.columns.channels + value_size)
        self.in_proj_ba = Linear(config.hidden_size, 2 * value_heads)
        self.conv1d = CausalConvolution(self.columns.channels, config.linear_conv_kernel_dim)
        # Both steer an exponential: bf16 steps of A_log would move a decay by up to 3 %.
        self.A_log = nn.Parameter(torch.zeros(value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.ones(value_heads, dtype=torch.float32))
        self.norm = GatedRMSNorm(self.columns.value_width, config.rms_norm_eps)
        self.out_proj = Linear(value_size, config.hidden_size)

    def forward(
        self, x: Float[Tensor, "T D"], inputs: PackedInputs, cache: DeltaNetCache | StateSlots | None
    ) -> Float[Tensor, "T D"]:
        """The mixed tokens; the cache is read before and written after."""
        qkvz, ba = self.in_proj_qkvz(x), self.in_proj_ba(x)
        if isinstance(cache, StateSlots):
            return self.out_proj(self._mix_in_slots(qkvz, ba, inputs.segments, cache))
        before = None if cache is None else cache.read()
        conv = self.conv1d(qkvz, inputs.segments, None if before is None else before.conv, self.columns)
        q, k, v = self.columns.heads(conv.output)
        log_decay, beta = self._gates(ba)
        state = None if before is None else before.recurrent
        mixed = gated_delta_rule(q, k, v, log_decay, beta, inputs.segments, state)
        if cache is not None:
            cache.write(DeltaNetState(conv.final_state, mixed.final_state))
        z = self.columns.gate(qkvz)
        return self.out_proj(self.norm(mixed.output.view(z.shape), z).flatten(1))

    def _gates(self, ba: Float[Tensor, "T 2*Hv"]) -> tuple[Float[Tensor, "T Hv"], Float[Tensor, "T Hv"]]:
        """log_decay and beta; for each key head `ba` holds [b | a] of its value heads."""
        b, a = ba.float().unflatten(-1, (self.columns.key_heads, -1)).chunk(2, dim=-1)
        log_decay = -self.A_log.float().exp() * F.softplus(a.flatten(1) + self.dt_bias.float())
        return log_decay, b.flatten(1).sigmoid()

    def _mix_in_slots(
        self, qkvz: Float[Tensor, "T P"], ba: Float[Tensor, "T 2*Hv"], segments: Segments, cache: StateSlots
    ) -> Float[Tensor, "T Hv*Dv"]:
        """The same on states in slots, for inference: steps go token by token, everything else in chunks."""
        is_few = segments.max_length <= STEP_TOKENS and cache.snapshots is None
        steps = cache.steps if cache.steps is not None else segments.count * is_few
        if steps in (0, segments.count):
            return (self._mix_steps if steps else self._mix_chunks)(qkvz, ba, segments, cache)
        (first, others), (of_first, of_others) = segments.split(steps), cache.split(steps)
        border = first.total
        mixed = self._mix_steps(qkvz[:border], ba[:border], first, of_first)
        return torch.cat([mixed, self._mix_chunks(qkvz[border:], ba[border:], others, of_others)])

    def _mix_steps(self, qkvz: Tensor, ba: Tensor, segments: Segments, cache: StateSlots) -> Tensor:
        return delta_net_step_(qkvz, ba, self._step_weights(), cache.state, cache.slots, segments, cache.accepted)

    def _mix_chunks(self, qkvz: Tensor, ba: Tensor, segments: Segments, cache: StateSlots) -> Tensor:
        state, slots, snapshots = cache.state, cache.slots, cache.snapshots
        if cache.accepted is not None:  # drafts of an earlier call become part of the states before the new tokens do
            nothing = Segments.uniform(segments.count, 0, segments.device)
            delta_net_step_(qkvz[:0], ba[:0], self._step_weights(), state, slots, nothing, cache.accepted)
        conv, columns = self.conv1d.weight[:, 0], self.columns
        q, k, v = columns.heads(causal_conv_(qkvz, conv, segments, state.conv, slots, columns, snapshots))
        log_decay, beta = self._gates(ba)
        output = gated_delta_rule_(q, k, v, log_decay, beta, segments, state.recurrent, slots, snapshots)
        z = columns.gate(qkvz)
        return self.norm(output.view(z.shape), z).flatten(1)

    def _step_weights(self) -> StepWeights:
        conv = self.conv1d.weight[:, 0]
        return StepWeights(conv, self.A_log, self.dt_bias, self.norm.weight, self.norm.eps, self.columns)

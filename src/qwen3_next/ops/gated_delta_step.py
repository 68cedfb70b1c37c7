"""A few new tokens per sequence through a whole DeltaNet layer, projections aside: decoding, and checking drafts."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.causal_conv import ProjectionColumns, causal_conv, causal_conv_
from qwen3_next.ops.gated_delta import gated_delta_rule, gated_delta_rule_
from qwen3_next.ops.norm import gated_rms_norm
from qwen3_next.ops.segments import Segments


@dataclass(frozen=True, eq=False)
class StepWeights:
    """The parameters of a DeltaNet layer between its projections.

    Attributes:
        conv: the taps of each channel; the last one multiplies the current token.
        A_log: `log_decay = -exp(A_log) softplus(a + dt_bias)`.
        norm: of the gated RMS norm, whose epsilon is `eps`.
        columns: how the rows of the projection are laid out.
    """

    conv: Float[Tensor, "C W"]
    A_log: Float[Tensor, "Hv"]
    dt_bias: Float[Tensor, "Hv"]
    norm: Float[Tensor, "Dv"]
    eps: float
    columns: ProjectionColumns


@dataclass(frozen=True, eq=False)
class StepState:
    """What a DeltaNet layer remembers, in M slots.

    `recurrent` and `conv` are what `gated_delta_rule_` and `causal_conv_` read and write: a prompt goes through those
    and the steps go on from there. The tokens of a call that awaits its verdict are no part of them; their projections
    wait in `pending_*`, and the next call runs again those that were accepted. A rejected token is never undone, since
    it was never done, and a step reads and writes the large state once however many tokens it tries.

    Bytes of a slot at the published sizes (bf16, fp32 `recurrent`): 2 MiB for `recurrent`, 48 KiB for `conv`, 16.1 KiB
    for each pending token.

    Attributes:
        recurrent: the state of each head, fp32 or bf16; computed in fp32.
        conv: the last W-1 inputs of the convolution, oldest first.
        pending_qkv: the inputs of the convolution that await a verdict, in order.
        pending_ba: their b and a.
    """

    recurrent: Float[Tensor, "M Hv Dk Dv"]
    conv: Float[Tensor, "M C W-1"]
    pending_qkv: Float[Tensor, "M P C"]
    pending_ba: Float[Tensor, "M P 2*Hv"]

    @classmethod
    def allocate(
        cls,
        slots: int,
        weights: StepWeights,
        pending: int,
        dtype: torch.dtype,
        recurrent_dtype: torch.dtype = torch.float32,
    ) -> "StepState":
        """Zeros, which is the state before the first token, on the device of the weights.

        Args:
            slots: M.
            pending: P, the most tokens of a sequence in a call that awaits a verdict; 0 where no call does.
            dtype: of the projections.
        """
        columns, device = weights.columns, weights.conv.device
        channels, taps = weights.conv.shape
        state = (slots, columns.value_heads, columns.key_width, columns.value_width)
        return cls(
            torch.zeros(state, dtype=recurrent_dtype, device=device),
            torch.zeros(slots, channels, taps - 1, dtype=dtype, device=device),
            torch.zeros(slots, pending, channels, dtype=dtype, device=device),
            torch.zeros(slots, pending, 2 * columns.value_heads, dtype=dtype, device=device),
        )

    def require_room(self, tokens: int) -> None:
        """Refuse calls that leave more pending tokens than there is room for.

        Raises:
            InputError: `tokens` is more than P.
        """
        room = self.pending_qkv.shape[1]
        if tokens > room:
            raise InputError(
                f"a sequence brings {tokens} tokens that await a verdict, and the state has room for {room}; "
                "allocate it with a larger `pending`, or bring fewer."
            )


@accelerated("gated_delta_step_triton")
@torch.no_grad()
def delta_net_step_(
    qkvz: Float[Tensor, "T P"],
    ba: Float[Tensor, "T 2*Hv"],
    weights: StepWeights,
    state: StepState,
    slots: Int[Tensor, "N"],
    segments: Segments,
    accepted: Int[Tensor, "N"] | None = None,
) -> Float[Tensor, "T Hv*Dv"]:
    """Convolution, gates, gated delta rule and gated norm of a few new tokens per sequence, on states in slots.

    `causal_conv`, `gated_delta_rule` and `gated_rms_norm` in a row, with `log_decay = -exp(A_log) softplus(a +
    dt_bias)` and `beta = sigmoid(b)`. (Yang et al. 2024, arXiv:2412.06464, section 3 and figure 1.) Has no gradient.

    Args:
        qkvz: the projected tokens, laid out as `weights.columns` says.
        ba: for each key head `[b | a]` of its value heads.
        slots: where the state of each sequence is; all distinct but for negative ones, which mark null sequences: their
            output is zero and they have no state.
        segments: meant for up to 8 tokens of each sequence; a sequence may have none.
        accepted: None: the tokens become part of the state at once. Else the tokens of this call become pending, in
            place of those that the last call left pending; of these the first `accepted[n]` become part of the state of
            sequence n before its new tokens see it. 0 after a prompt and after a call without `accepted`.

    Returns:
        The gated, normed heads, what the output projection takes.

    Raises:
        InputError: more tokens would be pending than the state has room for.
    """
    busy = [n for n, slot in enumerate(slots.tolist()) if slot >= 0]
    lengths = [segments.lengths[n] for n in busy]
    rows = [segments.starts[n] + i for n in busy for i in range(segments.lengths[n])]
    output = qkvz.new_zeros(qkvz.shape[0], weights.norm.shape[0] * weights.A_log.shape[0])
    z = weights.columns.gate(qkvz)[rows]
    tokens = _Tokens(weights.columns.gather(qkvz)[rows], ba[rows], Segments.from_lengths(lengths, qkvz.device))
    if accepted is None:
        mixed = _mix_(tokens, weights, state, slots[busy])
    else:
        state.require_room(segments.max_length)
        _mix_(_accepted_tokens(state, slots[busy], accepted[busy]), weights, state, slots[busy])
        mixed = _mix(tokens, weights, state, slots[busy])
        _leave_pending(tokens, state, slots[busy])
    output[rows] = gated_rms_norm(mixed.view(z.shape), z, weights.norm, weights.eps).flatten(1)
    return output


class _Tokens(NamedTuple):
    qkv: Float[Tensor, "T C"]
    ba: Float[Tensor, "T 2*Hv"]
    segments: Segments


def _accepted_tokens(state: StepState, slots: Int[Tensor, "N"], accepted: Int[Tensor, "N"]) -> _Tokens:
    counts: list[int] = accepted.tolist()
    rows = [(slot, i) for slot, count in zip(slots.tolist(), counts, strict=True) for i in range(count)]
    slot, index = torch.tensor(rows, dtype=torch.long, device=slots.device).view(-1, 2).T
    segments = Segments.from_lengths(counts, slots.device)
    return _Tokens(state.pending_qkv[slot, index], state.pending_ba[slot, index], segments)


def _leave_pending(tokens: _Tokens, state: StepState, slots: Int[Tensor, "N"]) -> None:
    slot, index = slots[tokens.segments.sequence_ids], tokens.segments.offsets
    state.pending_qkv[slot, index] = tokens.qkv.to(state.pending_qkv.dtype)
    state.pending_ba[slot, index] = tokens.ba.to(state.pending_ba.dtype)


def _mix_(tokens: _Tokens, weights: StepWeights, state: StepState, slots: Tensor) -> Float[Tensor, "T Hv Dv"]:
    """Convolve and run the rule; the tokens become part of the state."""
    qkv = causal_conv_(tokens.qkv, weights.conv, tokens.segments, state.conv, slots)
    fields = _arguments(qkv, tokens.ba, weights)
    return gated_delta_rule_(*fields, tokens.segments, state.recurrent, slots)


def _mix(tokens: _Tokens, weights: StepWeights, state: StepState, slots: Tensor) -> Float[Tensor, "T Hv Dv"]:
    """The same, and the state stays as it is."""
    qkv = causal_conv(tokens.qkv, weights.conv, tokens.segments, state.conv[slots]).output
    fields = _arguments(qkv, tokens.ba, weights)
    return gated_delta_rule(*fields, tokens.segments, state.recurrent[slots]).output


def _arguments(qkv: Tensor, ba: Tensor, weights: StepWeights) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns, accumulator = weights.columns, torch.promote_types(qkv.dtype, torch.float32)
    b, a = ba.to(accumulator).unflatten(-1, (columns.key_heads, -1)).chunk(2, dim=-1)
    log_decay = -weights.A_log.to(accumulator).exp() * F.softplus(a.flatten(1) + weights.dt_bias.to(accumulator))
    return *columns.heads(qkv), log_decay, b.flatten(1).sigmoid()

"""The short causal convolution in front of the gated delta rule."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots


@dataclass(frozen=True)
class ProjectionColumns:
    """Where q, k, v and the output gate z stand in projected rows that are grouped by key head.

    A row holds `key_heads` groups, each `[q | k | v of its value heads | z of them]`: P columns in all. The C channels
    of the convolution are `[all q | all k | all v]`.
    """

    key_heads: int
    value_heads: int
    key_width: int
    value_width: int

    @property
    def values(self) -> int:
        """Columns of v in a group, and of z."""
        return self.value_heads // self.key_heads * self.value_width

    @property
    def channels(self) -> int:
        """C."""
        return self.key_heads * (2 * self.key_width + self.values)

    def gather(self, x: Float[Tensor, "T P"]) -> Float[Tensor, "T C"]:
        """The channels, copied out of the rows."""
        q, k, v, _ = self._split(x)
        return torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], dim=-1)

    def gate(self, x: Float[Tensor, "T P"]) -> Float[Tensor, "T Hk R Dv"]:
        """z, as a view; R value heads share a key head."""
        return self._split(x)[-1].unflatten(-1, (-1, self.value_width))

    def heads(self, qkv: Float[Tensor, "T C"]) -> tuple[Tensor, Tensor, Tensor]:
        """q `[T Hk Dk]`, k `[T Hk Dk]` and v `[T Hv Dv]`, as views of the channels."""
        keys = self.key_heads * self.key_width
        q, k, v = qkv.split([keys, keys, self.value_heads * self.value_width], dim=-1)
        q, k = (x.unflatten(-1, (self.key_heads, self.key_width)) for x in (q, k))
        return q, k, v.unflatten(-1, (self.value_heads, self.value_width))

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        sizes = [self.key_width, self.key_width, self.values, self.values]
        return x.unflatten(-1, (self.key_heads, sum(sizes))).split(sizes, dim=-1)


class ConvOutput(NamedTuple):
    """The convolved tokens, and what the next call needs to continue."""

    output: Float[Tensor, "T C"]
    final_state: Float[Tensor, "N C W-1"]


@accelerated("causal_conv_triton")
def causal_conv(
    x: Float[Tensor, "T _"],
    weight: Float[Tensor, "C W"],
    segments: Segments,
    initial_state: Float[Tensor, "N C W-1"] | None = None,
    columns: ProjectionColumns | None = None,
) -> ConvOutput:
    """`silu(sum_w weight[:, w] x_{t - (W-1) + w})`: each channel sees its own last W inputs, of its own sequence only.

    `weight[:, W-1]` multiplies the current token. Computed in fp32 (fp64 for fp64 inputs) and rounded once to
    `x.dtype`. (Yang et al. 2024, arXiv:2412.06464, figure 1: the "Conv" box.)

    Args:
        initial_state: the W-1 inputs before the first token of each sequence, oldest first; None means zeros.
        columns: where the channels stand in `x`, which then is the whole projection `[T, P]`; None where `x` holds
            just the channels. `output` is `[T, C]` in either case.

    Returns:
        `final_state` holds the last W-1 inputs of each sequence in `x.dtype`. A sequence with fewer new tokens than
        that keeps the newest entries of its initial state in front of them; one without new tokens keeps its state.
    """
    x = x if columns is None else columns.gather(x)
    history = weight.shape[1] - 1
    if initial_state is None:
        initial_state = x.new_zeros(segments.count, x.shape[1], history)
    initial_state = initial_state.to(x.dtype)
    if segments.total == 0:
        return ConvOutput(torch.zeros_like(x), initial_state.clone())
    if segments.max_length == 1 and segments.is_uniform:
        return _one_token_each(x, weight, initial_state)
    if segments.is_uniform:
        return _equal_lengths(x, weight, segments, initial_state)
    return _any_lengths(x, weight, segments, initial_state)


@accelerated("causal_conv_triton")
@torch.no_grad()
def causal_conv_(
    x: Float[Tensor, "T _"],
    weight: Float[Tensor, "C W"],
    segments: Segments,
    states: Float[Tensor, "M C W-1"],
    slots: Int[Tensor, "N"],
    columns: ProjectionColumns | None = None,
    snapshots: Snapshots | None = None,
) -> Float[Tensor, "T C"]:
    """`causal_conv` on states that live in slots: sequence n reads `states[slots[n]]` and leaves its own there.

    A sequence without tokens leaves its slot alone. Has no gradient.

    Args:
        slots: the slots of sequences that have tokens are distinct.
        snapshots: states in the middle of the call, copied into further slots.

    Returns:
        The convolved tokens.
    """
    x = x if columns is None else columns.gather(x)
    before = states[slots]
    output, after = causal_conv(x, weight, segments, before)
    if snapshots is not None:
        _copy_windows(x, before, segments, states, snapshots)
    busy = torch.tensor([n for n, length in enumerate(segments.lengths) if length], dtype=torch.long, device=x.device)
    states[slots[busy]] = after[busy].to(states.dtype)
    return output


def _copy_windows(x: Tensor, before: Tensor, segments: Segments, states: Tensor, snapshots: Snapshots) -> None:
    for start, state, taken in zip(segments.starts, before, snapshots.by_sequence(segments), strict=True):
        for i in taken:
            tokens = x[start : max(start, snapshots.positions[i])]
            seen = torch.cat([state, tokens.T.to(state.dtype)], dim=1)
            states[snapshots.slots[i]] = seen[:, seen.shape[1] - state.shape[1] :]


def _one_token_each(x: Tensor, weight: Tensor, initial_state: Tensor) -> ConvOutput:
    """Decoding: the window is the state plus the token, in the layout that the state already has."""
    window = torch.cat([initial_state, x[..., None]], dim=-1)
    output = F.silu((window * weight.to(_accumulator(x))).sum(-1))
    return ConvOutput(output.to(x.dtype), window[..., 1:])


def _equal_lengths(x: Tensor, weight: Tensor, segments: Segments, initial_state: Tensor) -> ConvOutput:
    output, last = _filter(x.view(segments.count, -1, x.shape[1]), weight, initial_state.transpose(1, 2))
    return ConvOutput(output.flatten(0, 1), last.transpose(1, 2).contiguous())


def _any_lengths(x: Tensor, weight: Tensor, segments: Segments, initial_state: Tensor) -> ConvOutput:
    """Put each sequence's state in front of its tokens and filter all rows as if they were one sequence.

    The windows that straddle two sequences are the outputs at the rows of the states, which nobody reads.
    """
    history = weight.shape[1] - 1
    rows = _token_rows(segments, history)
    past = _state_rows(segments.cu_seqlens[:-1], history)
    padded = x.new_zeros(segments.total + past.shape[0], x.shape[1])
    padded.index_copy_(0, rows, x).index_copy_(0, past, initial_state.transpose(1, 2).flatten(0, 1))
    output, _ = _filter(padded[None, history:], weight, padded[None, :history])
    last = padded.index_select(0, _state_rows(segments.cu_seqlens[1:], history)).unflatten(0, (segments.count, history))
    return ConvOutput(output[0].index_select(0, rows - history), last.transpose(1, 2).contiguous())


def _token_rows(segments: Segments, history: int) -> Int[Tensor, "T"]:
    """The row of each token once every sequence is preceded by `history` rows of state."""
    tokens = torch.arange(segments.total, device=segments.device)
    return tokens + history * (segments.sequence_ids + 1)


def _state_rows(borders: Int[Tensor, "N"], history: int) -> Int[Tensor, "R"]:
    """The `history` rows that end where token `borders[n]` of sequence n would stand."""
    sequences = torch.arange(borders.shape[0], device=borders.device)
    first = borders.long() + history * sequences
    return (first[:, None] + torch.arange(history, device=borders.device)).flatten()


_BLOCK = 64
"""Rows taken at a time on a CPU: the passes over a block then run in cache, 10 times faster on long prompts."""


def _filter(
    x: Float[Tensor, "N L C"], weight: Float[Tensor, "C W"], before: Float[Tensor, "N W-1 C"]
) -> tuple[Float[Tensor, "N L C"], Float[Tensor, "N W-1 C"]]:
    """Convolution and SiLU along dimension 1, block by block; also hands back the last W-1 inputs."""
    taps = weight.t().to(_accumulator(x)).contiguous()
    length, history = x.shape[1], before.shape[1]
    size = length if x.is_cuda else max(1, history, _BLOCK // x.shape[0])
    first = torch.cat([before, x[:, :size]], dim=1)
    blocks = [first, *(x[:, start - history : start + size] for start in range(size, length, size))]
    outputs = [_weighted_windows(rows.to(taps.dtype), taps).to(x.dtype) for rows in blocks]
    tail = torch.cat([before, x[:, max(0, length - history) :]], dim=1)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), tail[:, tail.shape[1] - history :]


def _weighted_windows(rows: Float[Tensor, "N R C"], taps: Float[Tensor, "W C"]) -> Float[Tensor, "N L C"]:
    width = taps.shape[0]
    length = rows.shape[1] - width + 1
    total = rows[:, :length] * taps[0]
    for w in range(1, width):
        total = torch.addcmul(total, rows[:, w : w + length], taps[w])
    return F.silu(total)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

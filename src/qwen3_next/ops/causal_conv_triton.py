"""The short causal convolution on the GPU, forward and backward.

A program takes a block of channels through one part of a sequence (`Segments.cut`), token by token, and keeps the last
three inputs in registers: every input is read once.
"""
# pyright: basic, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (the two: tuples that unrolled loops of kernels fill)

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.causal_conv import ConvOutput, ProjectionColumns
from qwen3_next.ops.causal_conv_common_triton import (
    block_count,
    layout_of,
    load_taps,
    part_of,
    place,
    rows_of,
    weighted,
    window_before,
)
from qwen3_next.ops.causal_conv_grad_triton import differentiate
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

FORWARD = {"BLOCK": 512, "SIZE": 64, "UNROLL": 8, "num_warps": 4}
"""Channels of a program, tokens of a part, tokens whose loads are in flight together. For H100 and H200."""


def _refusal(x: Tensor, weight: Tensor, *_: object, **__: object) -> str | None:
    if torch.float64 in (x.dtype, weight.dtype):
        return "fp64 is not computed on the GPU"
    return "more than four taps" if weight.shape[1] > 4 else None


@refuses(_refusal)
def causal_conv(
    x: Float[Tensor, "T _"],
    weight: Float[Tensor, "C W"],
    segments: Segments,
    initial_state: Float[Tensor, "N C W-1"] | None = None,
    columns: ProjectionColumns | None = None,
) -> ConvOutput:
    """The twin of `ops.causal_conv.causal_conv`."""
    inputs = (x, weight) if initial_state is None else (x, weight, initial_state)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        return ConvOutput(*_CausalConv.apply(x, weight, initial_state, segments, columns))
    return _forward(x, weight, initial_state, segments, columns)


def _refusal_of_slots(
    x: Tensor, weight: Tensor, segments: Segments, states: Tensor, *_: object, **__: object
) -> str | None:
    return _refusal(x, weight) or (None if states[:1].is_contiguous() else "a slot of the states is not contiguous")


@refuses(_refusal_of_slots)
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
    """The twin of `ops.causal_conv.causal_conv_`."""
    x = rows_of(x)
    output = _convolve(x, weight, states, slots, segments, columns)
    if segments.total and weight.shape[1] > 1:
        # Copies of a state first: the last launch overwrites it.
        if snapshots is not None and snapshots.positions:
            _keep_windows(x, states, slots, segments, columns, states, snapshots)
        _keep_windows(x, states, slots, segments, columns, states)
    return output


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        initial_state: Tensor | None,
        segments: Segments,
        columns: ProjectionColumns | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, initial_state)
        ctx.segments, ctx.columns = segments, columns
        ctx.set_materialize_grads(False)
        output, final_state = _forward(x, weight, initial_state, segments, columns)
        return output, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, initial_state = ctx.saved_tensors
        d_x = x.new_empty(x.shape)
        d_weight = weight.new_zeros(weight.shape) if ctx.needs_input_grad[1] else None
        d_initial = _gradient_without_tokens(initial_state, d_final) if ctx.needs_input_grad[2] else None
        if ctx.segments.total:
            filled = x.new_zeros(x.shape[0], weight.shape[0]) if d_output is None else d_output.contiguous()
            given = (filled, None if d_final is None else d_final.contiguous())
            saved = (rows_of(x), weight.contiguous(), initial_state)
            partial = differentiate(saved, ctx.segments, ctx.columns, given, (d_x, d_weight, d_initial))
            d_weight = None if partial is None else partial.sum(0).t().to(weight.dtype).contiguous()
        return d_x, d_weight, d_initial, None, None


def _gradient_without_tokens(initial_state: Tensor, d_final: Tensor | None) -> Tensor:
    """What the gradient is for sequences that have no tokens; the kernel writes the others."""
    if d_final is None:
        return torch.zeros_like(initial_state, memory_format=torch.contiguous_format)
    return d_final.to(initial_state.dtype).clone(memory_format=torch.contiguous_format)


def _forward(
    x: Tensor, weight: Tensor, initial_state: Tensor | None, segments: Segments, columns: ProjectionColumns | None
) -> ConvOutput:
    x, initial_state = rows_of(x), None if initial_state is None else initial_state.contiguous()
    final_state = x.new_empty(segments.count, weight.shape[0], weight.shape[1] - 1)
    output = _convolve(x, weight, initial_state, None, segments, columns)
    if final_state.numel():
        _keep_windows(x, initial_state, None, segments, columns, final_state)
    return ConvOutput(output, final_state)


def _convolve(
    x: Tensor,
    weight: Tensor,
    states: Tensor | None,
    slots: Tensor | None,
    segments: Segments,
    columns: ProjectionColumns | None,
) -> Float[Tensor, "T C"]:
    output = x.new_empty(x.shape[0], weight.shape[0])
    if segments.total:
        settings = dict(FORWARD)
        parts, layout = segments.cut(settings["SIZE"]), layout_of(weight.shape[0], columns, settings.pop("BLOCK"))
        blocks = block_count(layout)
        _forward_kernel[(parts.count * blocks,)](
            *(x, weight.contiguous(), states, slots, output, parts.cu_seqlens, parts.first, parts.sequences),
            *(x.stride(0), 0 if states is None else states.stride(0)),
            BLOCKS=blocks, TAPS=weight.shape[1], **layout, **settings,
        )  # fmt: skip
    return output


def _keep_windows(
    x: Tensor,
    before: Tensor | None,
    slots: Tensor | None,
    segments: Segments,
    columns: ProjectionColumns | None,
    after: Tensor,
    snapshots: Snapshots | None = None,
) -> None:
    """Write the last inputs of every sequence, or those before the positions of the snapshots, to `after`."""
    _, channels, history = after.shape
    layout = layout_of(channels, columns, 1024)
    ids, positions, targets, count = None, None, slots, segments.count
    if snapshots is not None:
        ids, positions, targets = segments.sequence_ids, snapshots.after, snapshots.slots
        count = len(snapshots.positions)
    _window_kernel[(count * block_count(layout),)](
        *(x, before, slots, after, targets, ids, positions, segments.cu_seqlens, x.stride(0)),
        *(0 if before is None else before.stride(0), after.stride(0), segments.total),
        BLOCKS=block_count(layout), TAPS=history + 1, **layout, num_warps=4,
    )  # fmt: skip


@triton.jit
def _forward_kernel(
    p_x, p_weight, p_state, p_slots, p_output, p_cu_seqlens, p_first, p_sequences,
    row_stride, state_stride,
    BLOCKS: tl.constexpr, TAPS: tl.constexpr, SIZE: tl.constexpr, UNROLL: tl.constexpr,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_part, i_block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    o_channel, o_column, exists, _ = place(i_block, CHANNELS, HEADS, KEYS, VALUES, BLOCK)
    i_sequence, token, offset, left = part_of(p_cu_seqlens, p_first, p_sequences, i_part, SIZE)
    count = tl.minimum(left, SIZE)
    taps = load_taps(p_weight, o_channel, exists, TAPS)
    p_x += token * row_stride
    p_output += token * CHANNELS
    b_3, b_2, b_1 = window_before(
        p_x, p_state, p_slots, i_sequence, offset, row_stride, state_stride, o_channel, o_column, exists, TAPS
    )
    for t in range(0, count, UNROLL):
        rows = ()
        for i in tl.static_range(UNROLL):
            rows += (tl.load(p_x + i * row_stride + o_column, exists & (t + i < count), other=0.0),)
        for i in tl.static_range(UNROLL):
            b_0 = rows[i].to(tl.float32)
            b_sum = weighted(taps, b_3, b_2, b_1, b_0)
            b_output = b_sum / (1.0 + tl.exp(-b_sum))
            b_output = b_output.to(p_output.dtype.element_ty)
            tl.store(p_output + i * CHANNELS + o_channel, b_output, exists & (t + i < count))
            b_3, b_2, b_1 = b_2, b_1, b_0
        p_x += UNROLL * row_stride
        p_output += UNROLL * CHANNELS


@triton.jit(do_not_specialize=["tokens"])
def _window_kernel(
    p_x, p_before, p_sources, p_after, p_targets, p_ids, p_positions, p_cu_seqlens,
    row_stride, before_stride, after_stride, tokens,
    BLOCKS: tl.constexpr, TAPS: tl.constexpr,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One window, of sequence i at its end, or of the i-th snapshot (p_ids: the sequence of each token)."""
    i_window, i_block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    o_channel, o_column, exists, _ = place(i_block, CHANNELS, HEADS, KEYS, VALUES, BLOCK)
    i_sequence, end = i_window, tokens
    if p_ids is None:
        end = tl.load(p_cu_seqlens + i_window + 1)
    else:
        end = tl.load(p_positions + i_window)
        exists &= end <= tokens
        i_sequence = tl.load(p_ids + tl.minimum(tl.maximum(end - 1, 0), tokens - 1)).to(tl.int32)
    start = tl.load(p_cu_seqlens + i_sequence)
    source, target = i_sequence, i_window
    if p_sources is not None:
        source, target = tl.load(p_sources + i_sequence), tl.load(p_targets + i_window)
        if p_ids is None:
            exists &= end > start  # an empty sequence may name the slot of another
    window = ()
    for i in tl.static_range(TAPS - 1):
        row = end - start - (TAPS - 1) + i
        p_row = p_x + (start + row).to(tl.int64) * row_stride
        b_x = tl.load(p_row + o_column, exists & (row >= 0), other=0.0).to(tl.float32)
        if p_before is not None:
            p_entry = p_before + source.to(tl.int64) * before_stride + row + (TAPS - 1)
            b_x += tl.load(p_entry + o_channel * (TAPS - 1), exists & (row < 0), other=0.0).to(tl.float32)
        window += (b_x.to(p_x.dtype.element_ty),)
    tl.debug_barrier()  # the window may be written where it was read
    p_after += target.to(tl.int64) * after_stride
    for i in tl.static_range(TAPS - 1):
        tl.store(p_after + o_channel * (TAPS - 1) + i, window[i].to(p_after.dtype.element_ty), exists)

"""The gradients of the causal convolution on the GPU."""
# pyright: basic, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (the two: tuples that unrolled loops of kernels fill)

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.causal_conv import ProjectionColumns
from qwen3_next.ops.causal_conv_common_triton import (
    block_count,
    layout_of,
    load_taps,
    part_of,
    place,
    weighted,
    window_before,
)
from qwen3_next.ops.segments import Segments

BACKWARD = {"BLOCK": 512, "SIZE": 128, "UNROLL": 8, "num_warps": 4}


def differentiate(
    saved: tuple[Tensor, Tensor, Tensor | None],
    segments: Segments,
    columns: ProjectionColumns | None,
    given: tuple[Tensor, Tensor | None],
    wanted: tuple[Tensor, Tensor | None, Tensor | None],
) -> Float[Tensor, "G W C"] | None:
    """Fill the gradients of x and of the initial state; hand back the gradient of the weight of each part."""
    (x, weight, initial_state), (d_x, d_weight, d_initial) = saved, wanted
    settings = dict(BACKWARD)
    parts, layout = segments.cut(settings["SIZE"]), layout_of(weight.shape[0], columns, settings.pop("BLOCK"))
    blocks = block_count(layout)
    shape = (parts.count, weight.shape[1], weight.shape[0])
    partial = None if d_weight is None else x.new_empty(shape, dtype=torch.float32)
    _backward_kernel[(parts.count * blocks,)](
        *(x, weight, None if initial_state is None else initial_state.contiguous(), *given),
        *(d_x, partial, d_initial, parts.cu_seqlens, parts.first, parts.sequences, x.stride(0), d_x.stride(0)),
        BLOCKS=blocks, TAPS=weight.shape[1], **layout, **settings,
    )  # fmt: skip
    return partial


@triton.jit
def _slope(taps, b_3, b_2, b_1, b_0, b_d):
    """The gradient of the sum over the window, given that of its SiLU."""
    b_sum = weighted(taps, b_3, b_2, b_1, b_0)
    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_sum))
    return b_d.to(tl.float32) * b_sigmoid * (1.0 + b_sum * (1.0 - b_sigmoid))


@triton.jit
def _backward_kernel(
    p_x, p_weight, p_state, p_d_output, p_d_final, p_d_x, p_d_weight, p_d_state,
    p_cu_seqlens, p_first, p_sequences, row_stride, d_row_stride,
    BLOCKS: tl.constexpr, TAPS: tl.constexpr, SIZE: tl.constexpr, UNROLL: tl.constexpr,
    CHANNELS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`d x_{t-3} = sum_i taps_i d sum_{t-i}` is known at token t, so the walk goes three tokens beyond the part.

    Its first three steps find the gradients of what stands before the part: the state, or the tokens of another part,
    whose program finds them itself.
    """
    i_part, i_block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    o_channel, o_column, exists, is_value = place(i_block, CHANNELS, HEADS, KEYS, VALUES, BLOCK)
    i_sequence, token, offset, left = part_of(p_cu_seqlens, p_first, p_sequences, i_part, SIZE)
    count = tl.minimum(left, SIZE)
    taps = load_taps(p_weight, o_channel, exists, TAPS)
    p_x += token * row_stride
    p_d_x += token * d_row_stride
    p_d_output += token * CHANNELS
    b_3, b_2, b_1 = window_before(
        p_x, p_state, None, i_sequence, offset, row_stride, CHANNELS * (TAPS - 1), o_channel, o_column, exists, TAPS
    )
    o_state = i_sequence.to(tl.int64) * (CHANNELS * (TAPS - 1)) + o_channel * (TAPS - 1)
    b_zero = tl.zeros([BLOCK], dtype=tl.float32)
    d_3, d_2, d_1 = b_zero, b_zero, b_zero  # of the sums 3, 2 and 1 tokens ago
    d_taps_0, d_taps_1, d_taps_2, d_taps_3 = b_zero, b_zero, b_zero, b_zero
    for t in range(-3, count, UNROLL):  # t: the token whose gradient is known after the sum of token t + 3
        rows, slopes = (), ()
        for i in tl.static_range(UNROLL):
            present = exists & (t + 3 + i < left) & (t + i < count)
            rows += (tl.load(p_x + i * row_stride + o_column, present, other=0.0),)
            slopes += (tl.load(p_d_output + i * CHANNELS + o_channel, present, other=0.0),)
        for i in tl.static_range(UNROLL):
            b_0 = rows[i].to(tl.float32)
            d_0 = _slope(taps, b_3, b_2, b_1, b_0, slopes[i])
            if p_d_weight is not None:
                d_own = tl.where(t + 3 + i < count, d_0, 0.0)
                d_taps_0 += d_own * b_3
                d_taps_1 += d_own * b_2
                d_taps_2 += d_own * b_1
                d_taps_3 += d_own * b_0
            d_x = taps[3] * d_3 + taps[2] * d_2 + taps[1] * d_1 + taps[0] * d_0
            if p_d_final is not None:
                entry = t + i - left + (TAPS - 1)
                kept = exists & (entry >= 0) & (t + i < left)
                d_x += tl.load(p_d_final + o_state + entry, kept, other=0.0).to(tl.float32)
            inside = exists & (t + i >= 0) & (t + i < count)
            p_row = p_d_x + (t + i) * d_row_stride
            tl.store(p_row + o_column, d_x.to(p_d_x.dtype.element_ty), inside)
            if HEADS != 0:
                tl.store(p_row + o_column + VALUES, b_zero.to(p_d_x.dtype.element_ty), inside & is_value)
            if p_d_state is not None:
                before = exists & (offset == 0) & (t + i < 0) & (t + i + TAPS - 1 >= 0)
                tl.store(p_d_state + o_state + (t + i + TAPS - 1), d_x.to(p_d_state.dtype.element_ty), before)
            b_3, b_2, b_1, d_3, d_2, d_1 = b_2, b_1, b_0, d_2, d_1, d_0
        p_x += UNROLL * row_stride
        p_d_output += UNROLL * CHANNELS
    if p_d_weight is not None:
        p_d_weight += i_part.to(tl.int64) * (TAPS * CHANNELS) + o_channel - (4 - TAPS) * CHANNELS
        d_taps = (d_taps_0, d_taps_1, d_taps_2, d_taps_3)
        for i in tl.static_range(4 - TAPS, 4):
            tl.store(p_d_weight + i * CHANNELS, d_taps[i], exists)

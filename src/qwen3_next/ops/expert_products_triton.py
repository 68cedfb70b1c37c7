"""The products of experts with the rows that chose them, one launch for all experts.

Everywhere the weights stand on the left and rows on the right, so that few rows still fill the tensor cores.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false
# (the two: launches and rounded sizes of kernels, which Triton types as constants or not at all)

import triton
import triton.language as tl

from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.quant_triton import rounded_rows


@triton.jit
def gate_up_kernel(
    p_x, p_weight, p_scales, p_shared_gate, p_shared_up, p_shared_gate_scales, p_shared_up_scales,
    p_tokens, p_tiles, p_hidden, p_linear, tiles, choices, x_stride,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`silu(gate x) * (up x)` of a tile of sorted rows and ROWS hidden channels, rows gathered from the tokens.

    p_linear: where gate and up are wanted themselves, for a backward pass. The tokens are rounded if weights are fp8.
    """
    BLOCKS: tl.constexpr = (WIDTH + SCALE - 1) // SCALE
    TILES: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    i_tile, i_rows = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, begin, end = (
        tl.load(p_tiles + i_tile),
        tl.load(p_tiles + tiles + i_tile),
        tl.load(p_tiles + 2 * tiles + i_tile),
    )
    if begin < end:
        o_row = begin + tl.arange(0, TOKENS)
        o_channel, o_k = i_rows * ROWS + tl.arange(0, ROWS), tl.arange(0, K)
        o_weight = tl.minimum(o_channel, HIDDEN - 1)[:, None] * WIDTH + o_k[None, :]
        b_token = tl.load(p_tokens + o_row, (o_row < end) & (expert < EXPERTS), other=0)
        p_gate = p_weight + expert.to(tl.int64) * (2 * HIDDEN * WIDTH)
        p_up = p_gate + HIDDEN * WIDTH
        if p_scales is not None:
            SCALES: tl.constexpr = (HIDDEN + SCALE - 1) // SCALE * BLOCKS
            p_gate_scale = p_scales + expert * (2 * SCALES) + i_rows * ROWS // SCALE * BLOCKS
            p_up_scale = p_gate_scale + SCALES
        if p_shared_gate is not None:  # noqa: SIM102 (a constant, so apart from what follows)
            if expert == EXPERTS:
                b_token = o_row - choices
                p_gate, p_up = p_shared_gate, p_shared_up
                if p_scales is not None:
                    p_gate_scale = p_shared_gate_scales + i_rows * ROWS // SCALE * BLOCKS
                    p_up_scale = p_shared_up_scales + i_rows * ROWS // SCALE * BLOCKS
        is_row = o_row < end
        b_token = tl.where(is_row, b_token, 0)
        p_input = p_x + b_token.to(tl.int64)[:, None] * x_stride + o_k[None, :]
        b_gate, b_up = tl.zeros([ROWS, TOKENS], tl.float32), tl.zeros([ROWS, TOKENS], tl.float32)
        for k in range(0, WIDTH, K):
            if WIDTH % K == 0:
                b_gate_weight = tl.load(p_gate + o_weight + k)
                b_up_weight = tl.load(p_up + o_weight + k)
                b_x = tl.load(p_input + k)
            else:
                b_gate_weight = tl.load(p_gate + o_weight + k, (o_k < WIDTH - k)[None, :], other=0.0)
                b_up_weight = tl.load(p_up + o_weight + k, (o_k < WIDTH - k)[None, :], other=0.0)
                b_x = tl.load(p_input + k, (o_k < WIDTH - k)[None, :], other=0.0)
            if p_scales is None:
                b_gate = dot(b_gate_weight, tl.trans(b_x), b_gate)
                b_up = dot(b_up_weight, tl.trans(b_x), b_up)
            else:
                b_x, b_scale = rounded_rows(b_x)
                b_gate_scale = b_scale * tl.load(p_gate_scale + k // SCALE).to(tl.float32)
                b_up_scale = b_scale * tl.load(p_up_scale + k // SCALE).to(tl.float32)
                b_gate += dot(b_gate_weight, tl.trans(b_x)) * b_gate_scale[None, :]
                b_up += dot(b_up_weight, tl.trans(b_x)) * b_up_scale[None, :]
        o_output = o_row.to(tl.int64)[None, :] * HIDDEN + o_channel[:, None]
        mask = is_row[None, :] & (o_channel < HIDDEN)[:, None]
        if p_linear is not None:
            o_linear = o_row.to(tl.int64)[None, :] * (2 * HIDDEN) + o_channel[:, None]
            tl.store(p_linear + o_linear, b_gate.to(p_linear.dtype.element_ty), mask)
            tl.store(p_linear + o_linear + HIDDEN, b_up.to(p_linear.dtype.element_ty), mask)
        b_hidden = b_gate * tl.sigmoid(b_gate) * b_up
        tl.store(p_hidden + o_output, b_hidden.to(p_hidden.dtype.element_ty), mask)


@triton.jit
def rows_kernel(
    p_x, p_weight, p_scales, p_shared, p_shared_scales, p_tokens, p_tiles, p_result, tiles, x_stride,
    EXPERTS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of sorted rows times ROWS of the OUTPUTS rows of their expert's weight.

    p_tokens: where the input is not sorted itself, but gathered from the tokens. TRANSPOSED: weights are
    `[WIDTH, OUTPUTS]`, not `[OUTPUTS, WIDTH]`.
    """
    BLOCKS: tl.constexpr = (WIDTH + SCALE - 1) // SCALE
    TILES: tl.constexpr = (OUTPUTS + ROWS - 1) // ROWS
    i_tile, i_rows = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, begin, end = (
        tl.load(p_tiles + i_tile),
        tl.load(p_tiles + tiles + i_tile),
        tl.load(p_tiles + 2 * tiles + i_tile),
    )
    if begin < end:
        o_row = begin + tl.arange(0, TOKENS)
        o_output, o_k = i_rows * ROWS + tl.arange(0, ROWS), tl.arange(0, K)
        o_safe = tl.minimum(o_output, OUTPUTS - 1)
        is_row = o_row < end
        p_from = p_weight + expert.to(tl.int64) * (OUTPUTS * WIDTH)
        if p_scales is not None:
            p_scale = p_scales + expert * ((OUTPUTS + SCALE - 1) // SCALE * BLOCKS) + i_rows * ROWS // SCALE * BLOCKS
        if p_shared is not None:  # noqa: SIM102
            if expert == EXPERTS:
                p_from = p_shared
                if p_scales is not None:
                    p_scale = p_shared_scales + i_rows * ROWS // SCALE * BLOCKS
        b_source = tl.where(is_row, o_row, begin)
        if p_tokens is not None:
            b_source = tl.load(p_tokens + b_source)
        p_input = p_x + b_source.to(tl.int64)[:, None] * x_stride + o_k[None, :]
        b_result = tl.zeros([ROWS, TOKENS], tl.float32)
        for k in range(0, WIDTH, K):
            if TRANSPOSED:
                # Not clamped, but masked: adjacent columns are loaded at once.
                p_k = p_from + (k + o_k)[:, None] * OUTPUTS + o_output[None, :]
                b_weight = tl.trans(tl.load(p_k, (o_k < WIDTH - k)[:, None] & (o_output < OUTPUTS)[None, :], other=0.0))
            elif WIDTH % K == 0:
                b_weight = tl.load(p_from + o_safe[:, None] * WIDTH + (k + o_k)[None, :])
            else:
                p_k = p_from + o_safe[:, None] * WIDTH + (k + o_k)[None, :]
                b_weight = tl.load(p_k, (o_k < WIDTH - k)[None, :], other=0.0)
            if WIDTH % K == 0:
                b_x = tl.load(p_input + k)
            else:
                b_x = tl.load(p_input + k, (o_k < WIDTH - k)[None, :], other=0.0)
            if p_scales is None:
                b_result = dot(b_weight, tl.trans(b_x), b_result)
            else:
                b_x, b_scale = rounded_rows(b_x)
                b_scale *= tl.load(p_scale + k // SCALE).to(tl.float32)
                b_result += dot(b_weight, tl.trans(b_x)) * b_scale[None, :]
        p_output = p_result + o_row.to(tl.int64)[None, :] * OUTPUTS + o_output[:, None]
        tl.store(p_output, b_result.to(p_result.dtype.element_ty), is_row[None, :] & (o_output < OUTPUTS)[:, None])


@triton.jit
def combine_kernel(
    p_rows, p_shared, p_places, p_weights, p_share, p_result,
    K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weighted sum of a token's rows, in fp32, and of the shared expert's, whose weight is `sigmoid(share)`."""
    i_token, o_column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o_column < WIDTH
    b_sum = tl.zeros([BLOCK], tl.float32)
    if p_share is not None:
        share = tl.sigmoid(tl.load(p_share + i_token).to(tl.float32))
        b_sum += share * tl.load(p_shared + i_token * WIDTH + o_column, mask, other=0.0).to(tl.float32)
    for i in tl.static_range(K):
        row = tl.load(p_places + i_token * K + i).to(tl.int64)
        b_row = tl.load(p_rows + row * WIDTH + o_column, mask & (row >= 0), other=0.0).to(tl.float32)
        if p_weights is not None:
            b_row *= tl.load(p_weights + i_token * K + i).to(tl.float32)
        b_sum += b_row
    tl.store(p_result + i_token * WIDTH + o_column, b_sum.to(p_result.dtype.element_ty), mask)


@triton.jit
def weight_gradient_kernel(
    p_left, p_right, p_left_tokens, p_right_tokens, p_borders, p_result, left_stride, right_stride,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`sum over an expert's rows of left^T right`, `[OUTPUTS, WIDTH]`; zeros for an expert without rows.

    p_left_tokens, p_right_tokens: where that operand is gathered from the tokens.
    """
    i_column, i_row, i_expert = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(p_borders + i_expert), tl.load(p_borders + i_expert + 1)
    o_output, o_column = i_row * ROWS + tl.arange(0, ROWS), i_column * COLUMNS + tl.arange(0, COLUMNS)
    o_k = tl.arange(0, K)
    b_result = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(begin, end, K):
        is_row = o_k < end - k
        left, right = k + o_k, k + o_k
        if p_left_tokens is not None:
            left = tl.load(p_left_tokens + left, is_row, other=0)
        if p_right_tokens is not None:
            right = tl.load(p_right_tokens + right, is_row, other=0)
        p_l = p_left + left.to(tl.int64)[:, None] * left_stride + o_output[None, :]
        p_r = p_right + right.to(tl.int64)[:, None] * right_stride + o_column[None, :]
        b_left = tl.load(p_l, is_row[:, None] & (o_output < OUTPUTS)[None, :], other=0.0)
        b_right = tl.load(p_r, is_row[:, None] & (o_column < WIDTH)[None, :], other=0.0)
        b_result = dot(tl.trans(b_left), b_right, b_result)
    o_result = (i_expert.to(tl.int64) * OUTPUTS + o_output[:, None]) * WIDTH + o_column[None, :]
    mask = (o_output < OUTPUTS)[:, None] & (o_column < WIDTH)[None, :]
    tl.store(p_result + o_result, b_result.to(p_result.dtype.element_ty), mask)


@triton.jit
def hidden_gradient_kernel(
    p_linear, p_d_unweighted, p_weights, p_places, p_d_linear, p_weighted, p_d_weights,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one choice: gradients of gate, up and its weight, and its hidden channels times its weight.

    p_d_unweighted is the gradient of the hidden channels as if the weight were one.
    """
    i_choice, o_channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    row = tl.load(p_places + i_choice).to(tl.int64)
    weight = tl.load(p_weights + i_choice).to(tl.float32)
    mask = (o_channel < HIDDEN) & (row >= 0)  # an expert that is not here changes nothing
    p_gate = row * (2 * HIDDEN) + o_channel
    b_gate = tl.load(p_linear + p_gate, mask, other=0.0).to(tl.float32)
    b_up = tl.load(p_linear + p_gate + HIDDEN, mask, other=0.0).to(tl.float32)
    b_gradient = tl.load(p_d_unweighted + row * HIDDEN + o_channel, mask, other=0.0).to(tl.float32)
    b_sigmoid = tl.sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_hidden = b_silu * b_up
    tl.store(p_d_weights + i_choice, tl.sum(b_hidden * b_gradient, axis=0).to(p_d_weights.dtype.element_ty))
    tl.store(p_weighted + row * HIDDEN + o_channel, (b_hidden * weight).to(p_weighted.dtype.element_ty), mask)
    b_gradient *= weight
    b_d_gate = b_gradient * b_up * (b_sigmoid + b_silu * (1 - b_sigmoid))
    tl.store(p_d_linear + p_gate, b_d_gate.to(p_d_linear.dtype.element_ty), mask)
    tl.store(p_d_linear + p_gate + HIDDEN, (b_gradient * b_silu).to(p_d_linear.dtype.element_ty), mask)

"""The products of experts that many rows chose: weights come in by tensor descriptors, rows stand on the left.

The kernels of expert_products_triton.py do the same for any shape; these are faster where rows fill a tile.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false
# (the two: launches and rounded sizes of kernels, which Triton types as constants or not at all)

import triton
import triton.language as tl

from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.quant_triton import scale_of, to_e4m3


@triton.jit
def wide_gate_up_kernel(
    p_x, p_x_scales, d_weight, p_scales, p_tokens, p_tiles, p_hidden, p_hidden_scales, p_linear, tiles, x_stride,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`silu(gate x) * (up x)` of a tile of sorted rows and ROWS hidden channels, in fp8 where the weights are."""
    BLOCKS: tl.constexpr = (WIDTH + SCALE - 1) // SCALE
    TILES: tl.constexpr = (HIDDEN + ROWS - 1) // ROWS
    i_tile, i_rows = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, begin, end = (
        tl.load(p_tiles + i_tile),
        tl.load(p_tiles + tiles + i_tile),
        tl.load(p_tiles + 2 * tiles + i_tile),
    )
    if begin < end:
        o_row, o_k = begin + tl.arange(0, TOKENS), tl.arange(0, K)
        is_row = o_row < end
        b_token = tl.load(p_tokens + o_row, is_row, other=0)
        p_input = p_x + b_token.to(tl.int64)[:, None] * x_stride + o_k[None, :]
        i_gate = expert * (2 * HIDDEN) + i_rows * ROWS
        SCALES: tl.constexpr = (HIDDEN + SCALE - 1) // SCALE * BLOCKS
        if p_scales is not None:
            p_gate_scale = p_scales + expert * (2 * SCALES) + i_rows * ROWS // SCALE * BLOCKS
        b_gate, b_up = tl.zeros([TOKENS, ROWS], tl.float32), tl.zeros([TOKENS, ROWS], tl.float32)
        for k in range(0, WIDTH, K):
            b_gate_weight, b_up_weight = d_weight.load([i_gate, k]), d_weight.load([i_gate + HIDDEN, k])
            if WIDTH % K == 0:
                b_x = tl.load(p_input + k)
            else:
                b_x = tl.load(p_input + k, (o_k < WIDTH - k)[None, :], other=0.0)
            if p_scales is None:
                b_gate = dot(b_x, tl.trans(b_gate_weight), b_gate)
                b_up = dot(b_x, tl.trans(b_up_weight), b_up)
            else:
                b_scale = tl.load(p_x_scales + b_token * BLOCKS + k // SCALE)
                b_gate_scale = b_scale * tl.load(p_gate_scale + k // SCALE).to(tl.float32)
                b_up_scale = b_scale * tl.load(p_gate_scale + SCALES + k // SCALE).to(tl.float32)
                b_gate += dot(b_x, tl.trans(b_gate_weight)) * b_gate_scale[:, None]
                b_up += dot(b_x, tl.trans(b_up_weight)) * b_up_scale[:, None]
        o_channel = i_rows * ROWS + tl.arange(0, ROWS)
        mask = is_row[:, None] & (o_channel < HIDDEN)[None, :]
        if p_linear is not None:
            p_gate = p_linear + o_row.to(tl.int64)[:, None] * (2 * HIDDEN) + o_channel[None, :]
            tl.store(p_gate, b_gate.to(p_linear.dtype.element_ty), mask)
            tl.store(p_gate + HIDDEN, b_up.to(p_linear.dtype.element_ty), mask)
        b_hidden = b_gate * tl.sigmoid(b_gate) * b_up
        p_output = p_hidden + o_row.to(tl.int64)[:, None] * HIDDEN + o_channel[None, :]
        if p_scales is None:
            tl.store(p_output, b_hidden.to(p_hidden.dtype.element_ty), mask)
        else:
            # ROWS is SCALE, so the tile's rows are blocks; rounded to bf16 as the definition does between products.
            b_hidden = tl.where((o_channel < HIDDEN)[None, :], b_hidden, 0.0).to(tl.bfloat16).to(tl.float32)
            b_scale = scale_of(tl.max(tl.abs(b_hidden), axis=1))
            tl.store(p_hidden_scales + o_row * TILES + i_rows, b_scale, is_row)
            tl.store(p_output, to_e4m3(b_hidden * (1.0 / b_scale)[:, None]), mask)


@triton.jit
def wide_rows_kernel(
    d_x, p_x_scales, d_weight, p_scales, p_tiles, p_result, tiles,
    OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of sorted rows times ROWS of the OUTPUTS rows of their expert's weight."""
    BLOCKS: tl.constexpr = (WIDTH + SCALE - 1) // SCALE
    TILES: tl.constexpr = (OUTPUTS + ROWS - 1) // ROWS
    i_tile, i_rows = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    expert, begin, end = (
        tl.load(p_tiles + i_tile),
        tl.load(p_tiles + tiles + i_tile),
        tl.load(p_tiles + 2 * tiles + i_tile),
    )
    if begin < end:
        o_row, o_output = begin + tl.arange(0, TOKENS), i_rows * ROWS + tl.arange(0, ROWS)
        is_row = o_row < end
        if p_scales is not None:
            p_scale = p_scales + expert * ((OUTPUTS + SCALE - 1) // SCALE * BLOCKS) + i_rows * ROWS // SCALE * BLOCKS
        b_result = tl.zeros([TOKENS, ROWS], tl.float32)
        for k in range(0, WIDTH, K):
            b_x, b_weight = d_x.load([begin, k]), d_weight.load([expert * OUTPUTS + i_rows * ROWS, k])
            if p_scales is None:
                b_result = dot(b_x, tl.trans(b_weight), b_result)
            else:
                b_scale = tl.load(p_x_scales + o_row * BLOCKS + k // SCALE, is_row, other=0.0)
                b_scale *= tl.load(p_scale + k // SCALE).to(tl.float32)
                b_result += dot(b_x, tl.trans(b_weight)) * b_scale[:, None]
        p_output = p_result + o_row.to(tl.int64)[:, None] * OUTPUTS + o_output[None, :]
        tl.store(p_output, b_result.to(p_result.dtype.element_ty), is_row[:, None] & (o_output < OUTPUTS)[None, :])

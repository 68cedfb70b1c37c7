"""Block-scaled fp8 on the GPU: weights and activations quantised in one pass, and what other kernels round with."""
# pyright: basic

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.common_triton import INTERPRETED
from qwen3_next.ops.quant import FP8_BLOCK, ActivationFp8, BlockFp8, check_scales

TOKENS = 32
"""Tokens of a program, 128 channels of each. For H100 and H200."""


def _refusal(x: Tensor) -> str | None:
    return "fp64 is not computed on the GPU" if x.dtype == torch.float64 else None


@refuses(_refusal)
@torch.no_grad()
def quantize_activations(x: Float[Tensor, "T I"]) -> ActivationFp8:
    """The twin of `ops.quant.quantize_activations`."""
    tokens, width = x.shape
    scales = torch.empty(tokens, triton.cdiv(width, FP8_BLOCK), dtype=torch.float32, device=x.device)
    result = ActivationFp8(torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=x.device), scales)
    quantize_into(x, *result)
    return result


def quantize_into(x: Float[Tensor, "T I"], values: Float8e4m3fn[Tensor, "T I"], scales: Float[Tensor, "T IB"]) -> None:
    """Quantise `x` into the first T rows of two tensors; those of the scales may lie in any order."""
    tokens, width = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    if x.numel():
        _activations_kernel[(triton.cdiv(tokens, TOKENS), triton.cdiv(width, FP8_BLOCK))](
            *(x, values, scales, x.stride(0), values.stride(0), *scales.stride(), tokens, width),
            TOKENS=TOKENS, SCALE=FP8_BLOCK, num_warps=4,
        )  # fmt: skip


@refuses(_refusal)
@torch.no_grad()
def quantize_block_fp8(weight: Float[Tensor, "*E O I"]) -> BlockFp8:
    """The twin of `ops.quant.quantize_block_fp8`."""
    *experts, rows, columns = weight.shape
    blocks = triton.cdiv(rows, FP8_BLOCK), triton.cdiv(columns, FP8_BLOCK)
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scales = torch.empty(*experts, *blocks, dtype=torch.float32, device=weight.device)
    if weight.numel():
        matrices = weight.numel() // (rows * columns)
        _weight_kernel[(matrices * blocks[0] * blocks[1],)](
            weight.contiguous(), values, scales, rows, columns, *blocks, SCALE=FP8_BLOCK, num_warps=8
        )
    return BlockFp8(values, scales)


def _dequantize_refusal(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype) -> str | None:
    return "fp64 is not computed on the GPU" if dtype == torch.float64 else None


@refuses(_dequantize_refusal)
def dequantize_block_fp8(
    weight: Float8e4m3fn[Tensor, "O I"], scale_inv: Float[Tensor, "OB IB"], dtype: torch.dtype
) -> Float[Tensor, "O I"]:
    """The twin of `ops.quant.dequantize_block_fp8`."""
    check_scales(weight, scale_inv)
    (rows, columns), blocks = weight.shape, scale_inv.shape
    result = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    if result.numel():
        _dequantize_kernel[(blocks[0] * blocks[1],)](
            weight.contiguous(), scale_inv.contiguous(), result, rows, columns, blocks[1], SCALE=FP8_BLOCK, num_warps=8
        )
    return result


@triton.jit
def scale_of(b_largest):
    """The factor that brings the largest magnitude of a block to 448, the largest e4m3; 1 for zeros."""
    b_scale = tl.div_rn(b_largest, 448.0)  # as torch divides; the bits of both agree
    return tl.where(b_scale == 0, 1.0, b_scale)


@triton.jit
def to_e4m3(b_x):
    """fp32 to the nearest e4m3, ties to even, saturating; NaN stays."""
    if INTERPRETED:  # whose cast loses the carry where rounding reaches a power of two, and makes a number of NaN
        b_abs, b_sign = tl.minimum(tl.abs(b_x), 448.0), (b_x.to(tl.int32, bitcast=True) >> 24) & 0x80
        # To add 1.5 * 2^23 units of e4m3's last bit and take them off again rounds to these; all below 2^-6 share one.
        b_exponent = tl.maximum(b_abs.to(tl.int32, bitcast=True) & 0x7F800000, (127 - 6) << 23)
        b_units = (b_exponent + (20 << 23)).to(tl.float32, bitcast=True) * 1.5
        b_code = ((b_abs + b_units) - b_units).to(tl.float8e4nv).to(tl.uint8, bitcast=True) | b_sign.to(tl.uint8)
        return tl.where(b_x == b_x, b_code, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return b_x.to(tl.float8e4nv)


@triton.jit
def divided(b_x, b_scale):
    """`b_x / b_scale` rounded to nearest where the scale is above 2^-126, by one division per scale; -0 becomes 0.

    (Markstein 1990, IBM J. Res. Dev. 34(1): a product with the rounded inverse, corrected by its exact remainder.)
    """
    if INTERPRETED:  # which rounds between product and sum
        return b_x / b_scale
    b_inverse = tl.minimum(tl.div_rn(1.0, b_scale), 3e38)
    b_quotient = b_x * b_inverse
    return tl.fma(tl.fma(-b_quotient, tl.zeros_like(b_x) + b_scale, b_x), tl.zeros_like(b_x) + b_inverse, b_quotient)


@triton.jit
def rounded_rows(b_x):
    """Rows as fp8 keeps them, and their scales."""
    b_x = b_x.to(tl.float32)
    b_scale = scale_of(tl.max(tl.abs(b_x), axis=1))
    return to_e4m3(divided(b_x, b_scale[:, None])), b_scale


@triton.jit
def rounded(b_x, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """One row as fp8 keeps it, in fp32 with its scales multiplied in."""
    b_values, b_scale = rounded_rows(tl.reshape(b_x, [BLOCK // SCALE, SCALE]))
    return tl.reshape(b_values.to(tl.float32) * b_scale[:, None], [BLOCK])


@triton.jit
def spread(p_scale, WIDTH: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr):
    """The scales of a row of a weight's blocks, each as often as its block has columns."""
    o_block = tl.arange(0, BLOCK // SCALE)
    b_scale = tl.load(p_scale + o_block, o_block < (WIDTH + SCALE - 1) // SCALE, other=0.0).to(tl.float32)
    return tl.reshape(tl.broadcast_to(b_scale[:, None], [BLOCK // SCALE, SCALE]), [BLOCK])


@triton.jit(do_not_specialize=["tokens"])
def _activations_kernel(
    p_x, p_values, p_scales, x_stride, values_stride, token_stride, block_stride, tokens, width,
    TOKENS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    o_token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    o_column = tl.program_id(1) * SCALE + tl.arange(0, SCALE)
    mask = (o_token < tokens)[:, None] & (o_column < width)[None, :]
    b_x = tl.load(p_x + o_token[:, None] * x_stride + o_column[None, :], mask, other=0.0)
    b_values, b_scale = rounded_rows(b_x)
    tl.store(p_values + o_token[:, None] * values_stride + o_column[None, :], b_values, mask)
    tl.store(p_scales + o_token * token_stride + tl.program_id(1) * block_stride, b_scale, o_token < tokens)


@triton.jit
def _weight_kernel(p_weight, p_values, p_scales, rows, columns, row_blocks, column_blocks, SCALE: tl.constexpr):
    i_block = tl.program_id(0)
    i_matrix, i_column = (i_block // (row_blocks * column_blocks)).to(tl.int64), i_block % column_blocks
    o_row = i_block // column_blocks % row_blocks * SCALE + tl.arange(0, SCALE)
    o_column = i_column * SCALE + tl.arange(0, SCALE)
    o_weight = (i_matrix * rows + o_row[:, None]) * columns + o_column[None, :]
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    b_weight = tl.load(p_weight + o_weight, mask, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(tl.abs(b_weight), axis=1), axis=0))
    tl.store(p_scales + i_block, scale)
    tl.store(p_values + o_weight, to_e4m3(divided(b_weight, scale)), mask)


@triton.jit
def _dequantize_kernel(p_weight, p_scales, p_result, rows, columns, column_blocks, SCALE: tl.constexpr):
    i_block = tl.program_id(0)
    o_row = (i_block // column_blocks).to(tl.int64) * SCALE + tl.arange(0, SCALE)
    o_column = i_block % column_blocks * SCALE + tl.arange(0, SCALE)
    o_weight, mask = (
        o_row[:, None] * columns + o_column[None, :],
        (o_row < rows)[:, None] & (o_column < columns)[None, :],
    )
    b_weight = tl.load(p_weight + o_weight, mask, other=0.0).to(tl.float32)
    b_weight *= tl.load(p_scales + i_block).to(tl.float32)
    tl.store(p_result + o_weight, b_weight.to(p_result.dtype.element_ty), mask)

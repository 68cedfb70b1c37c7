"""The linear layer on the GPU: a few tokens at the speed of memory, many at that of the tensor cores.

Ordinary weights meet many tokens in cuBLAS. A product of fp8 is promoted to fp32 after every 128 channels.
"""
# pyright: basic

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.linear import check_weight
from qwen3_next.ops.quant import FP8_BLOCK
from qwen3_next.ops.quant_triton import quantize_into, rounded, spread

VECTOR_TOKENS, VECTOR_TOKENS_FP8 = 2, 1
"""Up to so many tokens are multiplied without tensor cores, by programs that read whole rows of the weight at once."""

VECTOR_WIDTH = 8_192
VECTOR = {"elements": 4_096, "num_warps": 4}
VECTOR_FP8 = {"elements": 16_384, "num_warps": 8}
"""The widest row, and elements of the weight that a program takes. For H100 and H200."""

FEW_TOKENS = 16
FEW = {"ROWS": 64, "K": 128, "num_warps": 4, "num_stages": 4}
FEW_FP8 = {"ROWS": 64, "K": 128, "num_warps": 4, "num_stages": 6}
MANY_FP8 = {"ROWS": 128, "K": 128, "num_warps": 4, "num_stages": 3}
"""Up to how many tokens a program keeps many loads of the weight on their way; rows and columns of the weight that it
takes at once. K is 128 for fp8: a scale. For H100 and H200."""

FEW_ROWS = 4_096
"""Up to so many rows of an ordinary weight too few programs would read it: cuBLAS, which splits channels, is faster."""

MANY_TOKENS = 64
"""Tokens of a program of `MANY_FP8`."""

LIBRARY_ALIGNMENT = 512
"""Channels that cuBLAS asks a multiple of where weights have scales per block."""


def _refusal(x: Tensor, weight: Tensor, scale_inv: Tensor | None = None, bias: Tensor | None = None) -> str | None:
    if torch.float64 in (x.dtype, weight.dtype):
        return "fp64 is not computed on the GPU"
    return "a weight of another dtype" if scale_inv is None and weight.dtype != x.dtype else None


@refuses(_refusal)
def linear(
    x: Float[Tensor, "*B I"],
    weight: Float[Tensor, "O I"],
    scale_inv: Float[Tensor, "OB IB"] | None = None,
    bias: Float[Tensor, "O"] | None = None,
) -> Float[Tensor, "*B O"]:
    """The twin of `ops.linear.linear`; ordinary weights with gradients are torch's."""
    check_weight(x, weight, scale_inv)
    tokens = x.numel() // max(1, x.shape[-1])
    most = VECTOR_TOKENS if scale_inv is None else VECTOR_TOKENS_FP8
    by_rows = 0 < tokens <= most and 0 < weight.shape[1] <= VECTOR_WIDTH
    if scale_inv is None and (_differentiable(x, weight, bias) or not (by_rows or _takes_few(tokens, weight))):
        return F.linear(x, weight, bias)
    rows, weight = _adjacent(x.reshape(-1, x.shape[-1])), _adjacent(weight)
    scale_inv = None if scale_inv is None else scale_inv.contiguous()
    bias = None if bias is None else bias.contiguous()
    if by_rows:
        result = _vector_product(rows, weight, scale_inv, bias)
    elif scale_inv is None:
        result = x.new_empty(tokens, weight.shape[0])
        _launch(Rows(rows, None), weight, None, bias, result, FEW_TOKENS, FEW)
    else:
        result = _fp8_product(rows, weight, scale_inv, bias)
    return result.view(*x.shape[:-1], weight.shape[0])


def _differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _takes_few(tokens: int, weight: Tensor) -> bool:
    """Whether few tokens and an ordinary weight are multiplied here: where that was measured to beat cuBLAS."""
    return 0 < tokens <= FEW_TOKENS and len(weight) > FEW_ROWS and weight.shape[1] > 0 and weight.element_size() == 2


def _adjacent(x: Tensor) -> Tensor:
    """Rows may be far apart, the elements of one may not."""
    return x if x.stride(1) == 1 else x.contiguous()


def _vector_product(x: Tensor, weight: Tensor, scale_inv: Tensor | None, bias: Tensor | None) -> Tensor:
    rows, width = weight.shape
    result = x.new_empty(len(x), rows)
    block = max(FP8_BLOCK, triton.next_power_of_2(width))
    settings = VECTOR if scale_inv is None else VECTOR_FP8
    tile = max(1, min(FP8_BLOCK, settings["elements"] // block))
    if result.numel() > 0:
        _vector_kernel[(triton.cdiv(rows, tile),)](
            x, weight, scale_inv, bias, result, x.stride(0), weight.stride(0), rows,
            WIDTH=width, SCALE=FP8_BLOCK, TOKENS=len(x), ROWS=tile, K=block, num_warps=settings["num_warps"],
        )  # fmt: skip
    return result


def _fp8_product(x: Tensor, weight: Tensor, scale_inv: Tensor, bias: Tensor | None) -> Tensor:
    """Tokens are quantised before: every program needs all channels of its tokens, so it would round them again."""
    tokens, columns = x.shape
    padded = triton.cdiv(tokens, 16) * 16  # how cuBLAS wants the scales aligned
    values = torch.empty(padded, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(triton.cdiv(columns, FP8_BLOCK), padded, dtype=torch.float32, device=x.device).t()
    quantize_into(x, values, scales)
    if tokens > FEW_TOKENS and _library_takes(x, weight, bias):
        recipe = F.ScalingType
        return F.scaled_mm(
            values, weight.t(), scales, recipe.BlockWise1x128, scale_inv.float().t(), recipe.BlockWise128x128,
            bias=bias, output_dtype=x.dtype,
        )[:tokens]  # fmt: skip
    result = x.new_empty(tokens, weight.shape[0])
    block, settings = (FEW_TOKENS, FEW_FP8) if tokens <= FEW_TOKENS else (MANY_TOKENS, MANY_FP8)
    _launch(Rows(values, scales), weight, scale_inv, bias, result, block, settings)
    return result


def _library_takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    rows, columns = weight.shape
    aligned = columns % LIBRARY_ALIGNMENT == 0 and rows % FP8_BLOCK == 0 and weight.is_contiguous()
    offered = x.is_cuda and hasattr(F, "scaled_mm") and torch.cuda.get_device_capability(x.device) == (9, 0)
    return offered and aligned and x.dtype == torch.bfloat16 and (bias is None or bias.dtype == x.dtype)


class Rows(NamedTuple):
    """Rows of the input, and their scales where they are quantised already."""

    values: Tensor
    scales: Tensor | None


def _launch(
    x: Rows,
    weight: Tensor,
    scale_inv: Tensor | None,
    bias: Tensor | None,
    result: Tensor,
    block: int,
    settings: dict[str, int],
) -> None:
    (tokens, rows), columns = result.shape, weight.shape[1]
    tiles, blocks = triton.cdiv(rows, settings["ROWS"]), triton.cdiv(tokens, block)
    strides = (0, 0) if x.scales is None else x.scales.stride()
    if result.numel() > 0:
        _matrix_kernel[(tiles * blocks,)](
            *(x.values, x.scales, weight, scale_inv, bias, result, x.values.stride(0), *strides),
            *(weight.stride(0), tokens, rows, tiles, blocks),
            WIDTH=columns, SCALE=FP8_BLOCK, TOKENS=block, **settings,
        )  # fmt: skip


@triton.jit
def _vector_kernel(
    p_x, p_weight, p_scales, p_bias, p_result, x_stride, weight_stride, rows,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A few rows of the weight, read once, times each token. K is the width filled up to a power of two."""
    o_row, o_k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, K)
    p_row = p_weight + o_row.to(tl.int64)[:, None] * weight_stride + o_k[None, :]
    inside = (o_row < rows)[:, None] if WIDTH == K else (o_row < rows)[:, None] & (o_k < WIDTH)[None, :]
    b_weight = tl.load(p_row, inside, other=0.0, eviction_policy="evict_first")
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_row, o_row < rows, other=0.0).to(tl.float32)
    for i_token in tl.static_range(TOKENS):
        b_x = tl.load(p_x + i_token * x_stride + o_k, o_k < WIDTH, other=0.0).to(tl.float32)
        if p_scales is not None:
            p_scale = p_scales + tl.program_id(0) * ROWS // SCALE * ((WIDTH + SCALE - 1) // SCALE)
            b_x = rounded(b_x, SCALE, K) * spread(p_scale, WIDTH, SCALE, K)
        b_result = tl.sum(b_weight.to(tl.float32) * b_x[None, :], axis=1)
        if p_bias is not None:
            b_result += b_bias
        p_out = p_result + i_token * rows + o_row
        tl.store(p_out, b_result.to(p_result.dtype.element_ty), o_row < rows)


@triton.jit(do_not_specialize=["tokens", "tiles", "blocks"])
def _matrix_kernel(
    p_x, p_x_scales, p_weight, p_scales, p_bias, p_result, x_stride, token_stride, tile_stride, weight_stride,
    tokens, rows, tiles, blocks,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A tile of the result, tokens along its second dimension: the weight is the operand of many rows."""
    i_tile, i_block = _tile_of(tl.program_id(0), tiles, blocks)
    o_row, o_k = i_tile * ROWS + tl.arange(0, ROWS), tl.arange(0, K)
    o_token = i_block.to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    p_weight += tl.minimum(o_row, rows - 1).to(tl.int64)[:, None] * weight_stride + o_k[None, :]
    p_x += o_token[:, None] * x_stride + o_k[None, :]
    if p_scales is not None:
        p_scales += (i_tile * ROWS // SCALE) * ((WIDTH + SCALE - 1) // SCALE)
        p_x_scales += o_token * token_stride
        b_next = tl.load(p_x_scales, o_token < tokens, other=0.0) * tl.load(p_scales).to(tl.float32)
    b_result = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in range(0, WIDTH, K):
        if WIDTH % K == 0:
            b_weight = tl.load(p_weight + k)
            b_x = tl.load(p_x + k, (o_token < tokens)[:, None], other=0.0)
        else:
            b_weight = tl.load(p_weight + k, (o_k < WIDTH - k)[None, :], other=0.0)
            b_x = tl.load(p_x + k, (o_token < tokens)[:, None] & (o_k < WIDTH - k)[None, :], other=0.0)
        if p_scales is None:
            b_result = dot(b_weight, tl.trans(b_x), b_result)
        else:
            # Scales of the next step are on their way while this one multiplies.
            b_scale, i_next, more = b_next, k // SCALE + 1, k + K < WIDTH
            b_next = tl.load(p_x_scales + i_next * tile_stride, (o_token < tokens) & more, other=0.0)
            b_next *= tl.load(p_scales + i_next, more, other=0.0).to(tl.float32)
            if p_result.dtype.element_ty == tl.float32:  # tensor cores keep 14 bits of a sum of e4m3, all of fp16's
                b_weight, b_x = b_weight.to(tl.float16), b_x.to(tl.float16)
            b_result += dot(b_weight, tl.trans(b_x)) * b_scale[None, :]
    if p_bias is not None:
        b_result += tl.load(p_bias + o_row, o_row < rows, other=0.0).to(tl.float32)[:, None]
    p_result += o_token[None, :] * rows + o_row[:, None]
    tl.store(p_result, b_result.to(p_result.dtype.element_ty), (o_row < rows)[:, None] & (o_token < tokens)[None, :])


@triton.jit
def _tile_of(i_program, tiles, blocks):
    """Programs that run side by side share rows of the weight and tokens: squares of eight blocks of tokens."""
    i_group, group = i_program // (8 * tiles), 8
    group = tl.minimum(8, blocks - i_group * 8)
    i_inside = i_program % (8 * tiles)
    return i_inside // group, i_group * 8 + i_inside % group

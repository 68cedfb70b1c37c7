"""The rotary embedding on the GPU, alone and after the norm of each head.

A program holds whole heads, and reads what turns a second time as the partners of its elements, from the cache.
"""
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.norm_triton import inverse_length, normed_gradient
from qwen3_next.ops.rows_triton import WIDEST, count_of, looping, offsets, rows_of, tile_of

FORWARD = {"tile": 4_096, "num_warps": 8}
BACKWARD = {"tile": 4_096, "programs": 2, "num_warps": 8}
"""Elements that a program takes at once, and how many programs loop on each multiprocessor. For H100 and H200."""


def _refusal(x: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "fp64 is not computed on the GPU"
    if not x.dtype == cos.dtype == sin.dtype:
        return "tables of another dtype"
    if cos.requires_grad or sin.requires_grad:
        return "gradients of the tables are not computed"
    return f"heads wider than {WIDEST:,}" if x.shape[-1] > WIDEST else None


def _refusal_of_normed(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> str | None:
    return _refusal(x, cos, sin) or ("a weight in fp64" if weight.dtype == torch.float64 else None)


@refuses(_refusal_of_normed)
def rms_norm_rotary(
    x: Float[Tensor, "T H Dh"],
    weight: Float[Tensor, "Dh"],
    eps: float,
    cos: Float[Tensor, "T 1 R"],
    sin: Float[Tensor, "T 1 R"],
) -> Float[Tensor, "T H Dh"]:
    """The twin of `ops.rotary.rms_norm_rotary`."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _NormRotary.apply(x, weight, eps, cos, sin)
    return _rotate(x, weight, eps, cos, sin)


@refuses(_refusal)
def apply_rotary(
    x: Float[Tensor, "T H Dh"], cos: Float[Tensor, "T 1 R"], sin: Float[Tensor, "T 1 R"]
) -> Float[Tensor, "T H Dh"]:
    """The twin of `ops.rotary.apply_rotary`."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Rotary.apply(x, cos, sin)
    return _rotate(x, None, 0.0, cos, sin)


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return _rotate(x, weight, eps, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        x, weight, cos, sin = ctx.saved_tensors
        return *_rotate_backward(x, weight, ctx.eps, cos, sin, grads[0], wanted), None, None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, None, 0.0, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(grads[0], None, 0.0, *ctx.saved_tensors, back=True), None, None


def _rotate(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        rows, tile = rows_of(x), tile_of(x.shape[-1], FORWARD["tile"])
        _rotate_kernel[(triton.cdiv(count_of(x), tile["ROWS"]),)](
            *(*rows.addresses, None if weight is None else weight.contiguous(), cos.contiguous(), sin.contiguous()),
            *(output, count_of(x), eps),
            INNER=rows.inner, BACK=back, HEADS=x.shape[1], HALF=cos.shape[-1], **tile, num_warps=FORWARD["num_warps"],
        )  # fmt: skip
    return output


def _rotate_backward(
    x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor, d_output: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
    rows, tile = rows_of(x), tile_of(x.shape[-1], BACKWARD["tile"])
    programs = looping(x, tile["ROWS"], BACKWARD["programs"])
    partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32) if wanted[1] else None
    if x.numel():
        _backward_kernel[(programs,)](
            *(*rows.addresses, weight.contiguous(), cos.contiguous(), sin.contiguous()),
            *(d_output.contiguous(), d_x, partial, count_of(x), eps),
            INNER=rows.inner, HEADS=x.shape[1], HALF=cos.shape[-1], **tile, num_warps=BACKWARD["num_warps"],
        )  # fmt: skip
    return d_x, None if partial is None else partial.sum(0).to(weight.dtype)


@triton.jit
def _places(rows, start, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows, columns, the column that each turns with, and which elements exist and turn."""
    o_row, o_column = start + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    o_partner = tl.where(o_column < HALF, o_column + HALF, o_column - HALF)
    exists = (o_row < rows)[:, None] & (o_column < WIDTH)[None, :]
    return o_row, o_column, o_partner, exists, exists & (o_column < 2 * HALF)[None, :]


@triton.jit
def _angles(p_cos, p_sin, o_row, o_column, turns, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """What an element and its partner are multiplied with: cos and -sin in the first half, cos and sin in the second.

    With BACK by the opposite angle. Columns that do not turn get 1 and 0.
    """
    o_angle = (o_row // HEADS).to(tl.int64)[:, None] * HALF
    o_angle += tl.where(o_column < HALF, o_column, o_column - HALF)[None, :]
    b_cos = tl.load(p_cos + o_angle, turns, other=1.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_angle, turns, other=0.0).to(tl.float32)
    return b_cos, tl.where(((o_column < HALF) != BACK)[None, :], -b_sin, b_sin)


@triton.jit
def _scale(p_weight, o_column, exists):
    """The factors of the norm. They are loaded as a vector: a row would impose its layout on whole tiles."""
    return 1.0 + tl.load(p_weight + o_column, exists, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def _rotate_kernel(
    p_x, x_stride, x_inner_stride, p_weight, p_cos, p_sin, p_output, rows, eps,
    INNER: tl.constexpr, BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_row, o_column, o_partner, exists, turns = _places(rows, tl.program_id(0) * ROWS, HALF, WIDTH, BLOCK, ROWS)
    p_rows = p_x + offsets(o_row, x_stride, x_inner_stride, INNER)[:, None]
    b_x = tl.load(p_rows + o_column[None, :], exists, other=0.0).to(tl.float32)
    b_partner = tl.load(p_rows + o_partner[None, :], turns, other=0.0).to(tl.float32)
    b_cos, b_sin = _angles(p_cos, p_sin, o_row, o_column, turns, BACK, HEADS, HALF)
    dtype = p_x.dtype.element_ty
    if p_weight is not None:
        b_inverse = inverse_length(b_x, eps, WIDTH)
        b_x = (b_x * b_inverse * _scale(p_weight, o_column, o_column < WIDTH)).to(dtype).to(tl.float32)
        b_partner = b_partner * b_inverse * _scale(p_weight, o_partner, o_column < 2 * HALF)
        b_partner = b_partner.to(dtype).to(tl.float32)
    # The product with cos is rounded before the other is added, as in the definition.
    b_output = (b_x * b_cos).to(dtype).to(tl.float32) + b_partner * b_sin
    o_output = o_row.to(tl.int64)[:, None] * WIDTH + o_column[None, :]
    tl.store(p_output + o_output, b_output.to(p_output.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    p_x, x_stride, x_inner_stride, p_weight, p_cos, p_sin, p_d_output, p_d_x, p_partial, rows, eps,
    INNER: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    b_scale = _scale(p_weight, tl.arange(0, BLOCK), tl.arange(0, BLOCK) < WIDTH)
    b_d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        o_row, o_column, o_partner, exists, turns = _places(rows, start, HALF, WIDTH, BLOCK, ROWS)
        o_x = offsets(o_row, x_stride, x_inner_stride, INNER)[:, None] + o_column[None, :]
        o_output = o_row.to(tl.int64)[:, None] * WIDTH
        b_x = tl.load(p_x + o_x, exists, other=0.0).to(tl.float32)
        b_grad = tl.load(p_d_output + o_output + o_column[None, :], exists, other=0.0).to(tl.float32)
        b_partner = tl.load(p_d_output + o_output + o_partner[None, :], turns, other=0.0).to(tl.float32)
        b_cos, b_sin = _angles(p_cos, p_sin, o_row, o_column, turns, True, HEADS, HALF)
        b_grad = b_grad * b_cos + b_partner * b_sin
        b_inverse = inverse_length(b_x, eps, WIDTH)
        b_d_weight += b_grad * b_x * b_inverse
        if p_d_x is not None:
            b_d_x = normed_gradient(b_x, b_inverse, b_grad * b_scale, WIDTH)
            tl.store(p_d_x + o_output + o_column[None, :], b_d_x.to(p_d_x.dtype.element_ty), exists)
    if p_partial is not None:
        o_column = tl.arange(0, BLOCK)
        p_partial += tl.program_id(0) * WIDTH
        tl.store(p_partial + o_column, tl.sum(b_d_weight, axis=0), o_column < WIDTH)

"""The norms on the GPU: a program holds whole rows. Gradients of a weight are summed in two stages, always alike."""
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.norm import AddedNorm
from qwen3_next.ops.rows_triton import WIDEST, count_of, looping, offsets, rows_of, tile_of

FORWARD = {"tile": 4_096, "num_warps": 4}
BACKWARD = {"tile": 4_096, "programs": 3, "num_warps": 8}
GATED_BACKWARD = {"tile": 4_096, "programs": 2, "num_warps": 8}
"""Elements that a program takes at once, and how many programs loop on each multiprocessor: as many as its registers
hold side by side. For H100 and H200."""


def _refusal(x: Tensor, weight: Tensor, *_: object, **__: object) -> str | None:
    if torch.float64 in (x.dtype, weight.dtype):
        return "fp64 is not computed on the GPU"
    return f"rows of more than {WIDEST:,} elements" if x.shape[-1] > WIDEST else None


def _refusal_of_pair(x: Tensor, other: Tensor, weight: Tensor, *_: object, **__: object) -> str | None:
    if x.shape != other.shape or x.dtype != other.dtype:
        return "two inputs of unlike shape or dtype"
    return _refusal(x, weight)


def _refusal_of_gated(x: Tensor, gate: Tensor, weight: Tensor, *_: object, **__: object) -> str | None:
    if weight.dtype not in (x.dtype, torch.float32):
        return "a weight of another dtype"
    return _refusal_of_pair(x, gate, weight)


@refuses(_refusal)
def rms_norm(x: Float[Tensor, "*B D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*B D"]:
    """The twin of `ops.norm.rms_norm`."""
    if _differentiable(x, weight):
        return _Norm.apply(x, None, weight, eps)[0]
    return _norm(x, None, weight, eps).normed


@refuses(_refusal_of_pair)
def add_rms_norm(
    x: Float[Tensor, "*B D"], residual: Float[Tensor, "*B D"], weight: Float[Tensor, "D"], eps: float
) -> AddedNorm:
    """The twin of `ops.norm.add_rms_norm`."""
    if _differentiable(x, residual, weight):
        return AddedNorm(*_Norm.apply(x, residual, weight, eps))
    return _norm(x, residual, weight, eps)


@refuses(_refusal_of_gated)
def gated_rms_norm(
    x: Float[Tensor, "*B Dv"], gate: Float[Tensor, "*B Dv"], weight: Float[Tensor, "Dv"], eps: float
) -> Float[Tensor, "*B Dv"]:
    """The twin of `ops.norm.gated_rms_norm`."""
    if _differentiable(x, gate, weight):
        return _GatedNorm.apply(x, gate, weight, eps)
    return _gated_norm(x, gate, weight, eps)


def _differentiable(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


class _Norm(torch.autograd.Function):
    """Of `x`, or of `x + residual`, which then is the second result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
        normed, stream = _norm(x, residual, weight, eps)
        ctx.save_for_backward(stream, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return (normed,) if residual is None else (normed, stream)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        stream, weight = ctx.saved_tensors
        d_normed, d_stream = grads if len(grads) == 2 else (grads[0], None)
        if d_normed is None:
            return d_stream, d_stream, None, None
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2]
        d_x, d_weight = _norm_backward(stream, weight, ctx.eps, d_normed, d_stream, wanted)
        return d_x, d_x if ctx.needs_input_grad[1] else None, d_weight, None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.eps = eps
        return _gated_norm(x, gate, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        return *_gated_norm_backward(x, gate, weight, ctx.eps, grads[0], ctx.needs_input_grad), None


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> AddedNorm:
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    stream = x if residual is None else torch.empty_like(normed)
    if x.numel():
        rows, tile = rows_of(x), tile_of(x.shape[-1], FORWARD["tile"])
        residual = None if residual is None else residual.contiguous()
        _norm_kernel[(triton.cdiv(count_of(x), tile["ROWS"]),)](
            *(*rows.addresses, residual, weight.contiguous(), normed, stream, count_of(x), eps),
            INNER=rows.inner, **tile, num_warps=FORWARD["num_warps"],
        )  # fmt: skip
    return AddedNorm(normed, stream)


def _norm_backward(
    x: Tensor, weight: Tensor, eps: float, d_normed: Tensor, d_stream: Tensor | None, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else None
    rows, tile = rows_of(x), tile_of(x.shape[-1], BACKWARD["tile"])
    programs = looping(x, tile["ROWS"], BACKWARD["programs"])
    partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32) if wanted[1] else None
    if x.numel():
        d_stream = None if d_stream is None else d_stream.contiguous()
        _norm_backward_kernel[(programs,)](
            *(*rows.addresses, weight.contiguous(), d_normed.contiguous(), d_stream, d_x, partial, count_of(x), eps),
            INNER=rows.inner, **tile, num_warps=BACKWARD["num_warps"],
        )  # fmt: skip
    return d_x, None if partial is None else partial.sum(0).to(weight.dtype)


def _gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        rows, gates, tile = rows_of(x), rows_of(gate), tile_of(x.shape[-1], FORWARD["tile"])
        _gated_norm_kernel[(triton.cdiv(count_of(x), tile["ROWS"]),)](
            *(*rows.addresses, *gates.addresses, weight.contiguous(), output, count_of(x), eps),
            X_INNER=rows.inner, GATE_INNER=gates.inner, **tile, num_warps=FORWARD["num_warps"],
        )  # fmt: skip
    return output


def _gated_norm_backward(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, d_output: Tensor, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_x, d_gate = (
        torch.empty_like(y, memory_format=torch.contiguous_format) if wanted[i] else None
        for i, y in enumerate((x, gate))
    )
    rows, gates, tile = rows_of(x), rows_of(gate), tile_of(x.shape[-1], GATED_BACKWARD["tile"])
    programs = looping(x, tile["ROWS"], GATED_BACKWARD["programs"])
    partial = x.new_empty(programs, x.shape[-1], dtype=torch.float32) if wanted[2] else None
    if x.numel():
        _gated_norm_backward_kernel[(programs,)](
            *(*rows.addresses, *gates.addresses, weight.contiguous(), d_output.contiguous(), d_x, d_gate, partial),
            *(count_of(x), eps),
            X_INNER=rows.inner, GATE_INNER=gates.inner, **tile, num_warps=GATED_BACKWARD["num_warps"],
        )  # fmt: skip
    return d_x, d_gate, None if partial is None else partial.sum(0).to(weight.dtype)


@triton.jit
def inverse_length(b_x, eps, WIDTH: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of every row; columns beyond the width hold zeros."""
    return tl.rsqrt(tl.sum(b_x * b_x, axis=1) / WIDTH + eps)[:, None]


@triton.jit
def normed_gradient(b_x, b_inverse, b_grad, WIDTH: tl.constexpr):
    """The gradient of x where `b_grad` is that of x * b_inverse."""
    b_normed = b_x * b_inverse
    b_along = tl.sum(b_normed * b_grad, axis=1)[:, None] / WIDTH
    return b_inverse * (b_grad - b_normed * b_along)


@triton.jit(do_not_specialize=["rows"])
def _norm_kernel(
    p_x, x_stride, x_inner_stride, p_residual, p_weight, p_normed, p_stream, rows, eps,
    INNER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_row, o_column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    exists = (o_row < rows)[:, None] & (o_column < WIDTH)[None, :]
    o_output = o_row.to(tl.int64)[:, None] * WIDTH + o_column[None, :]
    o_x = offsets(o_row, x_stride, x_inner_stride, INNER)[:, None] + o_column[None, :]
    b_x = tl.load(p_x + o_x, exists, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_stream = (b_x + tl.load(p_residual + o_output, exists, other=0.0).to(tl.float32)).to(p_x.dtype.element_ty)
        tl.store(p_stream + o_output, b_stream, exists)
        b_x = b_stream.to(tl.float32)
    b_scale = 1.0 + tl.load(p_weight + o_column, o_column < WIDTH, other=0.0).to(tl.float32)
    b_normed = b_x * inverse_length(b_x, eps, WIDTH) * b_scale[None, :]
    tl.store(p_normed + o_output, b_normed.to(p_normed.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    p_x, x_stride, x_inner_stride, p_weight, p_d_normed, p_d_stream, p_d_x, p_partial, rows, eps,
    INNER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_column = tl.arange(0, BLOCK)
    b_scale = 1.0 + tl.load(p_weight + o_column, o_column < WIDTH, other=0.0).to(tl.float32)
    b_d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        o_row = first + tl.arange(0, ROWS)
        exists = (o_row < rows)[:, None] & (o_column < WIDTH)[None, :]
        o_output = o_row.to(tl.int64)[:, None] * WIDTH + o_column[None, :]
        o_x = offsets(o_row, x_stride, x_inner_stride, INNER)[:, None] + o_column[None, :]
        b_x = tl.load(p_x + o_x, exists, other=0.0).to(tl.float32)
        b_grad = tl.load(p_d_normed + o_output, exists, other=0.0).to(tl.float32)
        b_inverse = inverse_length(b_x, eps, WIDTH)
        b_d_weight += b_grad * b_x * b_inverse
        if p_d_x is not None:
            b_d_x = normed_gradient(b_x, b_inverse, b_grad * b_scale[None, :], WIDTH)
            if p_d_stream is not None:
                b_d_x += tl.load(p_d_stream + o_output, exists, other=0.0).to(tl.float32)
            tl.store(p_d_x + o_output, b_d_x.to(p_d_x.dtype.element_ty), exists)
    if p_partial is not None:
        p_partial += tl.program_id(0) * WIDTH
        tl.store(p_partial + o_column, tl.sum(b_d_weight, axis=0), o_column < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def _gated_norm_kernel(
    p_x, x_stride, x_inner_stride, p_gate, gate_stride, gate_inner_stride, p_weight, p_output, rows, eps,
    X_INNER: tl.constexpr, GATE_INNER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_row, o_column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    exists = (o_row < rows)[:, None] & (o_column < WIDTH)[None, :]
    o_x = offsets(o_row, x_stride, x_inner_stride, X_INNER)[:, None] + o_column[None, :]
    o_gate = offsets(o_row, gate_stride, gate_inner_stride, GATE_INNER)[:, None] + o_column[None, :]
    b_x = tl.load(p_x + o_x, exists, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_gate, exists, other=0.0).to(tl.float32)
    b_weight = tl.load(p_weight + o_column, o_column < WIDTH, other=0.0)
    # Rounded where the definition rounds: to x's dtype before the weight, after it to the dtype of the two.
    b_normed = (b_x * inverse_length(b_x, eps, WIDTH)).to(p_x.dtype.element_ty).to(tl.float32)
    b_scaled = (b_normed * b_weight.to(tl.float32)[None, :]).to(p_weight.dtype.element_ty).to(tl.float32)
    b_output = b_scaled * b_gate / (1.0 + tl.exp(-b_gate))
    o_output = o_row.to(tl.int64)[:, None] * WIDTH + o_column[None, :]
    tl.store(p_output + o_output, b_output.to(p_output.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["rows"])
def _gated_norm_backward_kernel(
    p_x, x_stride, x_inner_stride, p_gate, gate_stride, gate_inner_stride,
    p_weight, p_d_output, p_d_x, p_d_gate, p_partial, rows, eps,
    X_INNER: tl.constexpr, GATE_INNER: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_column = tl.arange(0, BLOCK)
    b_weight = tl.load(p_weight + o_column, o_column < WIDTH, other=0.0).to(tl.float32)[None, :]
    b_d_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        o_row = first + tl.arange(0, ROWS)
        exists = (o_row < rows)[:, None] & (o_column < WIDTH)[None, :]
        o_output = o_row.to(tl.int64)[:, None] * WIDTH + o_column[None, :]
        o_x = offsets(o_row, x_stride, x_inner_stride, X_INNER)[:, None] + o_column[None, :]
        o_gate = offsets(o_row, gate_stride, gate_inner_stride, GATE_INNER)[:, None] + o_column[None, :]
        b_x = tl.load(p_x + o_x, exists, other=0.0).to(tl.float32)
        b_gate = tl.load(p_gate + o_gate, exists, other=0.0).to(tl.float32)
        b_grad = tl.load(p_d_output + o_output, exists, other=0.0).to(tl.float32)
        b_inverse = inverse_length(b_x, eps, WIDTH)
        b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
        b_d_scaled = b_grad * b_gate * b_sigmoid
        b_d_weight += b_d_scaled * b_x * b_inverse
        if p_d_gate is not None:
            b_slope = b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
            b_d_gate = b_grad * b_x * b_inverse * b_weight * b_slope
            tl.store(p_d_gate + o_output, b_d_gate.to(p_d_gate.dtype.element_ty), exists)
        if p_d_x is not None:
            b_d_x = normed_gradient(b_x, b_inverse, b_d_scaled * b_weight, WIDTH)
            tl.store(p_d_x + o_output, b_d_x.to(p_d_x.dtype.element_ty), exists)
    if p_partial is not None:
        p_partial += tl.program_id(0) * WIDTH
        tl.store(p_partial + o_column, tl.sum(b_d_weight, axis=0), o_column < WIDTH)

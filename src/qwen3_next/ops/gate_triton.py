"""The products with a gate on the GPU."""
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.rows_triton import Rows, count_of, offsets, rows_of

TILE = {"BLOCK": 1_024, "tile": 4_096, "num_warps": 4}
"""The most columns of a program, and its elements. For H100 and H200."""


def _refusal(x: Tensor, gate: Tensor) -> str | None:
    if x.dtype == torch.float64:
        return "fp64 is not computed on the GPU"
    return None if x.dtype == gate.dtype and x.shape == gate.shape else "two inputs of unlike shape or dtype"


@refuses(_refusal)
def sigmoid_gate(x: Float[Tensor, "T H Dh"], gate: Float[Tensor, "T H Dh"]) -> Float[Tensor, "T H Dh"]:
    """The twin of `ops.gate.sigmoid_gate`."""
    return _gated(x, gate, silu=False)


@refuses(_refusal)
def swiglu(gate: Float[Tensor, "*B F"], up: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
    """The twin of `ops.gate.swiglu`."""
    return _gated(up, gate, silu=True)


def _gated(x: Tensor, gate: Tensor, silu: bool) -> Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad):
        return _Gate.apply(x, gate, silu)
    return _forward(x, gate, silu)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, silu: bool) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.silu = silu
        return _forward(x, gate, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, gate = ctx.saved_tensors
        d_x, d_gate = (
            torch.empty_like(y, memory_format=torch.contiguous_format) if ctx.needs_input_grad[i] else None
            for i, y in enumerate((x, gate))
        )
        if x.numel():
            rows, gates, d_rows = rows_of(x), rows_of(gate), rows_of(grads[0])
            grid, constants = _launch(x, rows, gates)
            _backward_kernel[grid](
                *(*rows.addresses, *gates.addresses, *d_rows.addresses, d_x, d_gate, count_of(x)),
                D_INNER=d_rows.inner, SILU=ctx.silu, **constants,
            )  # fmt: skip
        return d_x, d_gate, None


def _forward(x: Tensor, gate: Tensor, silu: bool) -> Tensor:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        rows, gates = rows_of(x), rows_of(gate)
        grid, constants = _launch(x, rows, gates)
        _forward_kernel[grid](*rows.addresses, *gates.addresses, output, count_of(x), SILU=silu, **constants)
    return output


def _launch(x: Tensor, rows: Rows, gates: Rows) -> tuple[tuple[int], dict[str, int]]:
    width = x.shape[-1]
    block = min(TILE["BLOCK"], triton.next_power_of_2(width))
    tile = {"WIDTH": width, "BLOCK": block, "ROWS": TILE["tile"] // block, "num_warps": TILE["num_warps"]}
    programs = triton.cdiv(count_of(x), tile["ROWS"]) * triton.cdiv(width, block)
    return (programs,), {"X_INNER": rows.inner, "GATE_INNER": gates.inner, **tile}


@triton.jit
def _place(rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Rows and columns of a program, and which of them exist."""
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    o_row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    o_column = (tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK))[None, :]
    return o_row, o_column, (o_row < rows)[:, None] & (o_column < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    p_x, x_stride, x_inner_stride, p_gate, gate_stride, gate_inner_stride, p_output, rows,
    SILU: tl.constexpr, X_INNER: tl.constexpr, GATE_INNER: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_row, o_column, exists = _place(rows, WIDTH, BLOCK, ROWS)
    o_x = offsets(o_row, x_stride, x_inner_stride, X_INNER)[:, None] + o_column
    o_gate = offsets(o_row, gate_stride, gate_inner_stride, GATE_INNER)[:, None] + o_column
    b_x = tl.load(p_x + o_x, exists, other=0.0).to(tl.float32)
    b_gate = tl.load(p_gate + o_gate, exists, other=0.0).to(tl.float32)
    b_factor = 1.0 / (1.0 + tl.exp(-b_gate))
    if SILU:
        b_factor *= b_gate
    b_output = b_x * b_factor.to(p_gate.dtype.element_ty).to(tl.float32)  # rounded where the definition rounds
    o_output = o_row.to(tl.int64)[:, None] * WIDTH + o_column
    tl.store(p_output + o_output, b_output.to(p_output.dtype.element_ty), exists)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    p_x, x_stride, x_inner_stride, p_gate, gate_stride, gate_inner_stride, p_grad, grad_stride, grad_inner_stride,
    p_d_x, p_d_gate, rows,
    SILU: tl.constexpr, X_INNER: tl.constexpr, GATE_INNER: tl.constexpr, D_INNER: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    o_row, o_column, exists = _place(rows, WIDTH, BLOCK, ROWS)
    o_gate = offsets(o_row, gate_stride, gate_inner_stride, GATE_INNER)[:, None] + o_column
    o_grad = offsets(o_row, grad_stride, grad_inner_stride, D_INNER)[:, None] + o_column
    o_output = o_row.to(tl.int64)[:, None] * WIDTH + o_column
    b_gate = tl.load(p_gate + o_gate, exists, other=0.0).to(tl.float32)
    b_grad = tl.load(p_grad + o_grad, exists, other=0.0).to(tl.float32)
    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
    if p_d_gate is not None:
        o_x = offsets(o_row, x_stride, x_inner_stride, X_INNER)[:, None] + o_column
        b_slope = b_sigmoid * (1.0 - b_sigmoid)
        if SILU:
            b_slope = b_sigmoid + b_gate * b_slope
        b_d_gate = b_grad * tl.load(p_x + o_x, exists, other=0.0).to(tl.float32) * b_slope
        tl.store(p_d_gate + o_output, b_d_gate.to(p_d_gate.dtype.element_ty), exists)
    if p_d_x is not None:
        b_d_x = b_grad * b_sigmoid
        if SILU:
            b_d_x *= b_gate
        tl.store(p_d_x + o_output, b_d_x.to(p_d_x.dtype.element_ty), exists)

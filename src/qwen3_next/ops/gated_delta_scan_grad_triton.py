"""The walks of the gated delta rule's gradient; gated_delta_grad_triton.py launches them and has the equations.

Both keep the state as `[BK, BV]` in registers. Each of their products takes its left operand from memory and its right
one through shared memory: no result of a product is a left operand, which Triton 3.6 gets wrong for Hopper in places.
Their loops have two stages or more: with one, the same kernel reads at invalid addresses.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# (the four: launches, rounded sizes and loops of kernels, which Triton types as constants or not at all)

import triton
import triton.language as tl

from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.gated_delta_scan_triton import load_rows, load_square


@triton.jit
def walks_kernel(
    p_q, p_k, p_v, p_grad_output, p_inverse, p_attention, p_scales, p_decay, p_initial, p_grad_final,
    p_states, p_written, p_grad_states, p_grad_alone, p_grad_initial, p_cu_seqlens, p_first_chunk,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, FORTH: tl.constexpr, BACK: tl.constexpr,
    VALUES: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head; some programs walk back with BACK columns of its state, others forth with FORTH.

    Neither walk needs the other, and with one sequence, one alone would leave half of the card idle.
    """
    i_head, i_column, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(p_cu_seqlens + i_sequence)
    length = tl.load(p_cu_seqlens + i_sequence + 1) - begin
    if length > 0:
        begin_row = begin.to(tl.int64)
        first_system = tl.load(p_first_chunk + i_sequence).to(tl.int64) * HV + i_head
        i_state = (i_sequence.to(tl.int64) * HV + i_head) * (DK * DV)
        p_k += i_head // (HV // HK) * DK
        p_q += i_head // (HV // HK) * DK
        columns: tl.constexpr = VALUES // BACK
        if i_column >= columns:
            _walk_forth(
                p_k, p_v + i_head * DV, p_inverse, p_scales, p_decay, p_initial + i_state,
                p_states, p_written, begin_row, length, first_system,
                (i_column - columns) * FORTH, K_ROW, V_ROW, HV, DK, DV, BK, FORTH, VALUES, L,
            )  # fmt: skip
        else:
            _walk_back(
                p_q, p_k, p_grad_output + i_head * DV, p_inverse, p_attention, p_scales, p_decay,
                p_grad_final + i_state, p_grad_states, p_grad_alone, p_grad_initial + i_state,
                begin_row, length, first_system,
                i_column * BACK, Q_ROW, K_ROW, HV, DK, DV, BK, BACK, VALUES, L,
            )  # fmt: skip


@triton.jit
def _walk_forth(
    p_k, p_v, p_inverse, p_scales, p_decay, p_initial, p_states, p_written, begin_row, length, first_system, column,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """From the first chunk to the last: S and Z."""
    o_row, o_k, o_column = tl.arange(0, L), tl.arange(0, BK), column + tl.arange(0, BV)
    o_state = o_k[:, None] * DV + o_column[None, :]
    is_state = (o_k < DK)[:, None] & (o_column < DV)[None, :]
    b_state = tl.load(p_initial + o_state, is_state, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, L)
    # Would not be fetched ahead by the compiler, because no product has it as an operand.
    decay = tl.load(p_decay + first_system)
    for number in range(chunks):
        row, count = begin_row + number * L, length - number * L
        i_system = first_system + number * HV
        p_scale = p_scales + i_system * (4 * L) + o_row
        b_k = load_rows(p_k, row, K_ROW, o_k, DK, count, L)
        b_v = load_rows(p_v, row, V_ROW, o_column, DV, count, L)
        b_inverse = load_square(p_inverse + i_system * (L * L), L)
        beta, survived, left = tl.load(p_scale), tl.load(p_scale + L), tl.load(p_scale + 2 * L)
        next_decay = tl.load(p_decay + tl.where(number + 1 < chunks, i_system + HV, i_system))
        b_entering = b_state.to(b_k.dtype)
        _store_tile(p_states, i_system, b_entering, o_k, o_column, BK, VALUES)
        b_error = beta[:, None] * (b_v.to(tl.float32) - survived[:, None] * dot(b_k, b_entering))
        b_written = dot(b_inverse, b_error.to(b_k.dtype))
        _store_tile(p_written, i_system, b_written, o_row, o_column, L, VALUES)
        b_state = dot(tl.trans(b_k), (left[:, None] * b_written).to(b_k.dtype), b_state * decay)
        decay = next_decay


@triton.jit
def _walk_back(
    p_q, p_k, p_grad_output, p_inverse, p_attention, p_scales, p_decay, p_grad_final,
    p_grad_states, p_grad_alone, p_grad_initial, begin_row, length, first_system, column,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, VALUES: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first; equations 1 to 3."""
    o_row, o_k, o_column = tl.arange(0, L), tl.arange(0, BK), column + tl.arange(0, BV)
    o_state = o_k[:, None] * DV + o_column[None, :]
    is_state = (o_k < DK)[:, None] & (o_column < DV)[None, :]
    b_state = tl.load(p_grad_final + o_state, is_state, other=0.0).to(tl.float32)
    chunks = tl.cdiv(length, L)
    decay = tl.load(p_decay + first_system + (chunks - 1) * HV)
    for i_back in range(chunks):
        number = chunks - 1 - i_back
        row, count = begin_row + number * L, length - number * L
        i_system = first_system + number * HV
        p_scale = p_scales + i_system * (4 * L) + o_row
        b_k = load_rows(p_k, row, K_ROW, o_k, DK, count, L)
        b_q = load_rows(p_q, row, Q_ROW, o_k, DK, count, L)
        b_output = load_rows(p_grad_output, row, HV * DV, o_column, DV, count, L)
        b_attention = load_square(p_attention + i_system * (L * L), L)
        b_inverse = load_square(p_inverse + i_system * (L * L), L)
        beta, survived = tl.load(p_scale), tl.load(p_scale + L)
        left, q_scale = tl.load(p_scale + 2 * L), tl.load(p_scale + 3 * L)
        next_decay = tl.load(p_decay + tl.where(number > 0, i_system - HV, i_system))
        b_leaving = b_state.to(b_k.dtype)
        _store_tile(p_grad_states, i_system, b_leaving, o_k, o_column, BK, VALUES)
        b_local = dot(tl.trans(b_attention), b_output)
        b_written = b_local + left[:, None] * dot(b_k, b_leaving)
        b_alone = dot(tl.trans(b_inverse), b_written.to(b_k.dtype))
        _store_tile(p_grad_alone, i_system, b_alone, o_row, o_column, L, VALUES)
        b_asked = (q_scale[:, None] * b_output.to(tl.float32)).to(b_k.dtype)
        b_state = dot(tl.trans(b_q), b_asked, b_state * decay)
        b_state = dot(tl.trans(b_k), ((-beta * survived)[:, None] * b_alone).to(b_k.dtype), b_state)
        decay = next_decay
    tl.store(p_grad_initial + o_state, b_state.to(p_grad_initial.dtype.element_ty), is_state)


@triton.jit
def _store_tile(p_x, i_system, b_x, o_row, o_column, ROWS: tl.constexpr, VALUES: tl.constexpr):
    """Columns of the `[ROWS, VALUES]` of one chunk of one value head."""
    p_place = p_x + i_system * (ROWS * VALUES) + (o_row[:, None] * VALUES + o_column[None, :])
    tl.store(p_place, b_x.to(p_x.dtype.element_ty))

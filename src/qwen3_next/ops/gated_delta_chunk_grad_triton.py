"""The gradients within a chunk of the gated delta rule; gated_delta_grad_triton.py launches them and has the equations.

No transposed result of a product is ever the left operand of another: Triton 3.4 to 3.7.0 miscompiles that for Hopper.
Where a transpose is needed, it is a product of its own, with the operands in the other order. And no product stands in
a loop that remains one in the machine code: the pipeliner gets some of those wrong.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# (the four: launches, rounded sizes and loops of kernels, which Triton types as constants or not at all)

import triton
import triton.language as tl

from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.gated_delta_scan_triton import load_rows, load_square


TERMS = tl.constexpr(7)
"""Rows of sums over channels that the two kernels of a chunk leave for the gradients of its gates."""


@triton.jit
def query_gradients_kernel(
    p_q, p_k, p_grad_output, p_written, p_states, p_attention, p_sums, p_scales, p_rstd_q, p_rstd_k,
    p_grad_q, p_terms, p_cu_seqlens, p_first_chunk, p_sequences, Q_ROW: tl.constexpr, K_ROW: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head; equation 5, and terms 0 and 1 of the gradients of the gates."""
    i_key, i_chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    exact: tl.constexpr = p_q.dtype.element_ty == tl.float32
    token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
    o_row, o_k = tl.arange(0, L), tl.arange(0, BK)
    b_grad = tl.zeros([L, BK], dtype=tl.float32)
    for i_head in range(i_key * (HV // HK), (i_key + 1) * (HV // HK)):
        token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
        i_system = i_chunk * HV + i_head
        p_term = p_terms + i_system * (TERMS * L) + o_row
        b_attention = tl.zeros([L, L], dtype=tl.float32)
        b_read = tl.zeros([L, BK], dtype=tl.float32)
        for i_value in tl.static_range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_output = load_rows(p_grad_output + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_written = load_rows(p_written + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_state = _load_state(p_states + i_system * (DK * DV), o_k, o_column, DK, DV)
            b_attention = dot(b_output, tl.trans(b_written), b_attention)
            b_read = dot(b_output, tl.trans(b_state), b_read)
        b_read *= tl.load(p_scales + i_system * (4 * L) + 3 * L + o_row)[:, None]
        b_q = load_rows(p_q + i_key * DK, token, Q_ROW, o_k, DK, count, L)
        along_q = tl.sum(b_q.to(tl.float32) * b_read, axis=1)
        b_grad += b_read
        b_given = load_square(p_attention + i_system * (L * L), L).to(tl.float32)
        b_decays = tl.where(o_row[:, None] > o_row[None, :], b_attention * b_given, 0.0)
        tl.store(p_term, along_q + tl.sum(b_decays, axis=1))
        tl.store(p_term + L, tl.sum(b_decays, axis=0))
        high, low = _load_sums(p_sums + token * HV + i_head, HV, count, L)
        b_attention *= _ratios(high[:, None], high[None, :], low[:, None], low[None, :],
                               (o_row[:, None] >= o_row[None, :]) & (o_row < count)[:, None], exact)  # fmt: skip
        rstd_q = _load_scales(p_rstd_q + token * HK + i_key, HK, count, L)
        rstd_k = _load_scales(p_rstd_k + token * HK + i_key, HK, count, L)
        b_attention *= rstd_q[:, None] * rstd_k[None, :]
        b_k = load_rows(p_k + i_key * DK, token, K_ROW, o_k, DK, count, L)
        b_grad = dot(b_attention.to(b_k.dtype), b_k, b_grad)
    token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
    b_q = load_rows(p_q + i_key * DK, token, Q_ROW, o_k, DK, count, L)
    rstd_q = _load_scales(p_rstd_q + token * HK + i_key, HK, count, L)
    _store_key(p_grad_q + (token * HK + i_key) * DK, b_grad, b_q, rstd_q * rstd_q * DK, count, HK, DK, BK)


@triton.jit
def key_gradients_kernel(
    p_q, p_k, p_v, p_grad_output, p_written, p_grad_alone, p_states, p_grad_states, p_sums, p_scales,
    p_rstd_q, p_rstd_k, p_grad_k, p_grad_v, p_terms, p_cu_seqlens, p_first_chunk, p_sequences,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head; equations 4 and 6, and terms 2 to 6 of the gradients of the gates."""
    i_key, i_chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    exact: tl.constexpr = p_q.dtype.element_ty == tl.float32
    token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
    o_row, o_k = tl.arange(0, L), tl.arange(0, BK)
    o_line, o_other = o_row[:, None], o_row[None, :]
    b_grad = tl.zeros([L, BK], dtype=tl.float32)
    for i_head in range(i_key * (HV // HK), (i_key + 1) * (HV // HK)):
        token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
        i_system = i_chunk * HV + i_head
        p_scale = p_scales + i_system * (4 * L) + o_row
        p_term = p_terms + i_system * (TERMS * L) + o_row

        # What a token receives from those before it.
        b_system = tl.zeros([L, L], dtype=tl.float32)
        for i_value in tl.static_range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_alone = load_rows(p_grad_alone + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_written = load_rows(p_written + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_system = dot(b_alone, tl.trans(b_written), b_system)
        high, low = _load_sums(p_sums + token * HV + i_head, HV, count, L)
        b_system *= _ratios(high[:, None], high[None, :], low[:, None], low[None, :],
                            (o_line > o_other) & (o_line < count), exact)  # fmt: skip
        rstd_k = _load_scales(p_rstd_k + token * HK + i_key, HK, count, L)
        b_system *= rstd_k[:, None] * rstd_k[None, :]
        b_k = load_rows(p_k + i_key * DK, token, K_ROW, o_k, DK, count, L)
        b_corrections = dot(b_k, tl.trans(b_k)) * b_system
        forgotten = tl.sum(b_corrections, axis=1)
        beta = tl.load(p_scale)
        tl.store(p_term + 3 * L, tl.sum(b_corrections * beta[:, None], axis=0))
        b_grad = dot((b_system * -beta[:, None]).to(b_k.dtype), b_k, b_grad)

        # From the state that enters.
        token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
        b_read = tl.zeros([L, BK], dtype=tl.float32)
        along_v = tl.zeros([L], dtype=tl.float32)
        for i_value in tl.static_range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_alone = load_rows(p_grad_alone + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_state = _load_state(p_states + i_system * (DK * DV), o_k, o_column, DK, DV)
            b_v = load_rows(p_v + i_head * DV, token, V_ROW, o_column, DV, count, L)
            b_read = dot(b_alone, tl.trans(b_state), b_read)
            along_v += tl.sum(b_alone.to(tl.float32) * b_v.to(tl.float32), axis=1)
            is_value = (o_line < count) & (o_column < DV)[None, :]
            p_place = p_grad_v + i_head * DV + token * (HV * DV) + (o_line * (HV * DV) + o_column[None, :])
            beta = tl.load(p_scale)
            tl.store(p_place, (b_alone.to(tl.float32) * beta[:, None]).to(b_alone.dtype), is_value)
        tl.store(p_term + 5 * L, along_v)
        b_read *= tl.load(p_scale + L)[:, None]
        b_k = load_rows(p_k + i_key * DK, token, K_ROW, o_k, DK, count, L)
        tl.store(p_term + 2 * L, forgotten + tl.sum(b_k.to(tl.float32) * b_read, axis=1))
        b_grad -= tl.load(p_scale)[:, None] * b_read

        # From the state that leaves.
        token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
        b_write = tl.zeros([L, BK], dtype=tl.float32)
        kept = 0.0
        for i_value in tl.static_range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_written = load_rows(p_written + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_grad_state = _load_state(p_grad_states + i_system * (DK * DV), o_k, o_column, DK, DV)
            b_write = dot(b_written, tl.trans(b_grad_state), b_write)
            b_state = _load_state(p_states + i_system * (DK * DV), o_k, o_column, DK, DV)
            kept += tl.sum(b_state.to(tl.float32) * b_grad_state.to(tl.float32))
        tl.store(p_terms + i_system * (TERMS * L) + 6 * L, kept)
        b_write *= tl.load(p_scale + 2 * L)[:, None]
        b_k = load_rows(p_k + i_key * DK, token, K_ROW, o_k, DK, count, L)
        tl.store(p_term + 4 * L, tl.sum(b_k.to(tl.float32) * b_write, axis=1))
        b_grad += b_write

        # What a token gives to those after it: transposes.
        token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
        b_system, b_attention = tl.zeros([L, L], dtype=tl.float32), tl.zeros([L, L], dtype=tl.float32)
        for i_value in tl.static_range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_written = load_rows(p_written + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_output = load_rows(p_grad_output + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_alone = load_rows(p_grad_alone + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_attention = dot(b_written, tl.trans(b_output), b_attention)
            b_system = dot(b_written, tl.trans(b_alone), b_system)
        high, low = _load_sums(p_sums + token * HV + i_head, HV, count, L)
        b_ratios = _ratios(high[None, :], high[:, None], low[None, :], low[:, None],
                           (o_line <= o_other) & (o_other < count), exact)  # fmt: skip
        rstd_q = _load_scales(p_rstd_q + token * HK + i_key, HK, count, L)
        rstd_k = _load_scales(p_rstd_k + token * HK + i_key, HK, count, L)
        b_ratios *= rstd_k[:, None]
        b_attention *= b_ratios * rstd_q[None, :]
        b_q = load_rows(p_q + i_key * DK, token, Q_ROW, o_k, DK, count, L)
        b_grad = dot(b_attention.to(b_q.dtype), b_q, b_grad)
        b_system *= tl.where(o_line < o_other, b_ratios * -(rstd_k * tl.load(p_scale))[None, :], 0.0)
        b_k = load_rows(p_k + i_key * DK, token, K_ROW, o_k, DK, count, L)
        b_grad = dot(b_system.to(b_k.dtype), b_k, b_grad)
    token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
    b_k = load_rows(p_k + i_key * DK, token, K_ROW, o_k, DK, count, L)
    rstd_k = _load_scales(p_rstd_k + token * HK + i_key, HK, count, L)
    _store_key(p_grad_k + (token * HK + i_key) * DK, b_grad, b_k, rstd_k * rstd_k, count, HK, DK, BK)


@triton.jit
def gate_gradients_kernel(
    p_terms, p_scales, p_decay, p_grad_log_decay, p_grad_beta, p_cu_seqlens, p_first_chunk, p_sequences,
    HV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head; equations 7 and 8, from their terms."""
    i_head, i_chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
    i_system = i_chunk * HV + i_head
    o_row = tl.arange(0, L)
    valid, beta = o_row < count, tl.load(p_scales + i_system * (4 * L) + o_row)
    p_term = p_terms + i_system * (TERMS * L) + o_row
    forgotten, place = tl.load(p_term + 2 * L), token * HV + i_head + o_row * HV
    grad_beta = tl.load(p_term + 5 * L) - forgotten
    tl.store(p_grad_beta + place, grad_beta.to(p_grad_beta.dtype.element_ty), valid)
    grad_sums = tl.load(p_term) - tl.load(p_term + L) + tl.load(p_term + 3 * L) - beta * forgotten
    # The decay of token t is in the sums of t and all after it, and in the fading of what those before it wrote.
    faded = tl.load(p_term + 4 * L)
    terms = tl.where(o_row[:, None] > o_row[None, :], faded[None, :], tl.where(valid, grad_sums, 0.0)[None, :])
    kept = tl.load(p_terms + i_system * (TERMS * L) + 6 * L) * tl.load(p_decay + i_system)
    grad_log_decay = tl.sum(terms, axis=1) + kept
    tl.store(p_grad_log_decay + place, grad_log_decay.to(p_grad_log_decay.dtype.element_ty), valid)


@triton.jit
def _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L: tl.constexpr):
    """The first token of a chunk (int64), and how many tokens its sequence has from there on."""
    i_sequence = tl.load(p_sequences + i_chunk)
    first = tl.load(p_cu_seqlens + i_sequence) + (i_chunk.to(tl.int32) - tl.load(p_first_chunk + i_sequence)) * L
    return first.to(tl.int64), tl.load(p_cu_seqlens + i_sequence + 1) - first


@triton.jit
def _load_scales(p_x, ROW: tl.constexpr, count, L: tl.constexpr):
    """One number for each row; 0 beyond `count`."""
    return tl.load(p_x + tl.arange(0, L) * ROW, tl.arange(0, L) < count, other=0.0)


@triton.jit
def _load_sums(p_sums, HV: tl.constexpr, count, L: tl.constexpr):
    """The fp64 sums as two fp32 numbers each."""
    sums = tl.load(p_sums + tl.arange(0, L) * HV, tl.arange(0, L) < count, other=0.0)
    high = sums.to(tl.float32)
    return high, (sums - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _load_state(p_state, o_k, o_column, DK: tl.constexpr, DV: tl.constexpr):
    """Columns of a state; zeros beyond its widths."""
    mask = (o_k < DK)[:, None] & (o_column < DV)[None, :]
    return tl.load(p_state + o_k[:, None] * DV + o_column[None, :], mask, other=0.0)


@triton.jit
def _ratios(later, earlier, later_low, earlier_low, mask, EXACT: tl.constexpr):
    """e^(sum of the later token - sum of the earlier) where the mask lets it, else 0."""
    differences = later - earlier
    if EXACT:
        # Sums reach -1000s: as two fp32 numbers each, their differences keep the precision of the single terms.
        differences += later_low - earlier_low
    return tl.exp(tl.where(mask, differences, float("-inf")))


@triton.jit
def _store_key(p_grad, b_grad, b_x, scale, count, HK: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr):
    """The gradient of x from that of x / |x|, which already has the factor 1 / |x|: less its part along x."""
    o_k = tl.arange(0, BK)
    along = tl.sum(b_x.to(tl.float32) * b_grad, axis=1) * scale
    b_grad -= b_x.to(tl.float32) * along[:, None]
    o_line = tl.arange(0, b_grad.shape[0])[:, None]
    is_key = (o_line < count) & (o_k < DK)[None, :]
    tl.store(p_grad + (o_line * (HK * DK) + o_k[None, :]), b_grad.to(p_grad.dtype.element_ty), is_key)

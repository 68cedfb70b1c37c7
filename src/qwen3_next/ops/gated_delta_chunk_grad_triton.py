"""The gradients within a chunk of the gated delta rule; gated_delta_grad_triton.py launches them and has the equations.

First the products of the values of a chunk among themselves, then those with the states, which need the former as
matrices in memory. So no result of a product is an operand of another in the same kernel: the compiler then spreads a
product of 64 rows over 8 warps, where it would let half of them repeat what the others do, and what Triton 3.4 to 3.7.0
miscompiles for Hopper, a transposed result as a left operand, cannot occur.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# (the four: launches, rounded sizes and loops of kernels, which Triton types as constants or not at all)

import triton
import triton.language as tl

from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.gated_delta_scan_triton import load_rows, load_square

TERMS = tl.constexpr(6)
"""Rows of sums over channels that the kernels leave for the gradients of the gates: of equation 8 what values give and
what they give to beta, then queries by the entering state, keys by the entering and by the leaving one; <dS', S>."""


@triton.jit(do_not_specialize=["systems"])
def value_gradients_kernel(
    p_k, p_v, p_grad_output, values, p_attention, p_sums, p_scales, p_rstd_q, p_rstd_k,
    p_grad_v, p_grad_attention, p_grad_system, p_terms, p_cu_seqlens, p_first_chunk, p_sequences, systems,
    K_ROW: tl.constexpr, V_ROW: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head: equation 4, `dP * Gamma` and Y with the lengths of the rows they will meet."""
    i_head, i_chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L)
    i_key, i_system = i_head // (HV // HK), i_chunk * HV + i_head
    o_row, o_k, o_column = tl.arange(0, L), tl.arange(0, BK), tl.arange(0, BV)
    o_line, o_other = o_row[:, None], o_row[None, :]
    o_square = i_system * (L * L) + o_line * L + o_other
    p_term = p_terms + i_system * (TERMS * L) + o_row
    beta = tl.load(p_scales + i_system * (4 * L) + o_row)

    b_alone = values.load([i_system.to(tl.int32) * L, 0])
    b_written = values.load([(systems + i_system.to(tl.int32)) * L, 0])
    b_output = load_rows(p_grad_output + i_head * DV, token, HV * DV, o_column, DV, count, L)
    b_v = load_rows(p_v + i_head * DV, token, V_ROW, o_column, DV, count, L)
    along_v = tl.sum(b_alone.to(tl.float32) * b_v.to(tl.float32), axis=1)
    is_value = (o_line < count) & (o_column < DV)[None, :]
    p_place = p_grad_v + i_head * DV + token * (HV * DV) + (o_line * (HV * DV) + o_column[None, :])
    tl.store(p_place, (b_alone.to(tl.float32) * beta[:, None]).to(p_grad_v.dtype.element_ty), is_value)
    b_grad_attention = dot(b_output, tl.trans(b_written))
    b_grad_system = dot(b_alone, tl.trans(b_written))
    b_k = load_rows(p_k + i_key * DK, token, K_ROW, o_k, DK, count, L)
    b_products = dot(b_k, tl.trans(b_k))

    b_attention = load_square(p_attention + i_system * (L * L), L).to(tl.float32)
    b_decays = tl.where(o_line > o_other, b_grad_attention * b_attention, 0.0)
    received = tl.sum(b_decays, axis=1) - tl.sum(b_decays, axis=0)
    high, low = _load_sums(p_sums + token * HV + i_head, HV, count, L)
    b_ratios = _ratios(high, low, (o_line >= o_other) & (o_line < count), p_k.dtype.element_ty == tl.float32)
    rstd_q = _load_scales(p_rstd_q + token * HK + i_key, HK, count, L)
    rstd_k = _load_scales(p_rstd_k + token * HK + i_key, HK, count, L)
    b_ratios *= rstd_k[None, :]
    b_grad_attention *= b_ratios * rstd_q[:, None]
    tl.store(p_grad_attention + o_square, b_grad_attention.to(p_grad_attention.dtype.element_ty))
    b_grad_system *= tl.where(o_line > o_other, -b_ratios * rstd_k[:, None], 0.0)
    b_corrections = b_grad_system * b_products
    mutual = tl.sum(b_corrections, axis=1)
    b_grad_system *= beta[:, None]
    tl.store(p_grad_system + o_square, b_grad_system.to(p_grad_system.dtype.element_ty))
    received += beta * mutual - tl.sum(b_corrections * beta[:, None], axis=0)
    tl.store(p_term, received)
    tl.store(p_term + L, along_v + mutual)


@triton.jit(do_not_specialize=["systems"])
def key_gradients_kernel(
    p_q, p_k, grad_output, values, states, grad_attention, grad_system, p_states,
    p_scales, p_rstd_q, p_rstd_k, p_grad_q, p_grad_k, p_terms, p_cu_seqlens, p_first_chunk, p_sequences, systems,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head; equations 5 and 6, each by a program of its own."""
    i_key, i_chunk = tl.program_id(0) // 2, tl.program_id(1)
    token, count = _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk.to(tl.int64), L)
    b_q = load_rows(p_q + i_key * DK, token, Q_ROW, tl.arange(0, BK), DK, count, L)
    b_k = load_rows(p_k + i_key * DK, token, K_ROW, tl.arange(0, BK), DK, count, L)
    if tl.program_id(0) % 2 == 0:
        rstd = _load_scales(p_rstd_q + token * HK + i_key, HK, count, L)
        b_grad = _query_gradients(
            b_q, b_k, grad_output, states, grad_attention, p_scales, p_terms, token, count,
            i_chunk * HV + i_key * (HV // HK), i_key * (HV // HK), HK, HV, BK, BV, L,
        )  # fmt: skip
        _store_key(p_grad_q + (token * HK + i_key) * DK, b_grad, b_q, rstd * rstd * DK, count, HK, DK, BK)
    else:
        rstd = _load_scales(p_rstd_k + token * HK + i_key, HK, count, L)
        b_grad = _key_gradients(
            b_q, b_k, values, states, grad_attention, grad_system, p_states, p_scales, p_terms, systems,
            i_chunk * HV + i_key * (HV // HK), HK, HV, BK, BV, L,
        )  # fmt: skip
        _store_key(p_grad_k + (token * HK + i_key) * DK, b_grad, b_k, rstd * rstd, count, HK, DK, BK)


@triton.jit
def _query_gradients(
    b_q, b_k, grad_output, states, grad_attention, p_scales, p_terms, token, count, first_system, first_head,
    HK: tl.constexpr, HV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Equation 5, and what queries give to the gates through the state that enters."""
    o_row = tl.arange(0, L)
    b_grad = tl.zeros([L, BK], dtype=tl.float32)
    for i_head in range(HV // HK):
        i_system = first_system + i_head
        # Rows beyond the sequence are those of another one.
        b_output = grad_output.load([token.to(tl.int32), first_head + i_head, 0]).reshape(L, BV)
        b_state = states.load([i_system * BK, 0])
        scale = tl.load(p_scales + i_system.to(tl.int64) * (4 * L) + 3 * L + o_row)
        b_read = tl.where((o_row < count)[:, None], dot(b_output, tl.trans(b_state)) * scale[:, None], 0.0)
        along = tl.sum(b_q.to(tl.float32) * b_read, axis=1)
        tl.store(p_terms + i_system.to(tl.int64) * (TERMS * L) + 2 * L + o_row, along)
        b_grad = _plus(b_read, b_grad)
    for i_head in range(HV // HK):
        b_attention = grad_attention.load([(first_system + i_head) * L, 0])
        b_grad = _plus(dot(b_attention, b_k), b_grad)
    return b_grad


@triton.jit
def _key_gradients(
    b_q, b_k, values, states, grad_attention, grad_system, p_states, p_scales, p_terms, systems, first_system,
    HK: tl.constexpr, HV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Equation 6, and what keys give to the gates through the states that enter and leave."""
    o_row = tl.arange(0, L)
    b_grad = tl.zeros([L, BK], dtype=tl.float32)
    for i_turn in range(2 * (HV // HK)):
        # dX with S in even turns, Z with dS' in odd ones.
        i_system, is_leaving = first_system + i_turn // 2, i_turn % 2
        tile = is_leaving * systems + i_system
        b_values = values.load([tile * L, 0])
        b_state = states.load([tile * BK, 0])
        p_scale = p_scales + i_system.to(tl.int64) * (4 * L) + o_row
        beta, scale = tl.load(p_scale), tl.load(p_scale + (1 + is_leaving) * L)
        b_read = dot(b_values, tl.trans(b_state)) * scale[:, None]
        along = tl.sum(b_k.to(tl.float32) * b_read, axis=1)
        tl.store(p_terms + i_system.to(tl.int64) * (TERMS * L) + (3 + is_leaving) * L + o_row, along)
        factor = tl.where(is_leaving == 1, 1.0, -beta)
        b_grad = tl.fma(b_read, tl.broadcast_to(factor[:, None], [L, BK]), b_grad)
    for i_head in range(HV // HK):
        i_system = first_system + i_head
        b_attention = grad_attention.load([i_system * L, 0])
        b_grad = _plus(dot(tl.trans(b_attention), b_q), b_grad)
        b_system = grad_system.load([i_system * L, 0])
        b_grad = _plus(dot(b_system, b_k), b_grad)
        b_grad = _plus(dot(tl.trans(b_system), b_k), b_grad)
        b_kept = tl.zeros([16, BV], dtype=tl.float32)
        for part in range(0, BK, 16):
            o_part = tl.arange(0, 16)[:, None] * BV + tl.arange(0, BV)[None, :]
            p_part = p_states + i_system.to(tl.int64) * (BK * BV) + part * BV
            p_leaving = p_part + systems.to(tl.int64) * (BK * BV)
            b_kept += tl.load(p_part + o_part).to(tl.float32) * tl.load(p_leaving + o_part).to(tl.float32)
        tl.store(p_terms + i_system.to(tl.int64) * (TERMS * L) + 5 * L, tl.sum(b_kept))
    return b_grad


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
    forgotten, place = tl.load(p_term + 3 * L), token * HV + i_head + o_row * HV
    grad_beta = tl.load(p_term + L) - forgotten
    tl.store(p_grad_beta + place, grad_beta.to(p_grad_beta.dtype.element_ty), valid)
    grad_sums = tl.load(p_term) + tl.load(p_term + 2 * L) - beta * forgotten
    # The decay of token t is in the sums of t and all after it, and in the fading of what those before it wrote.
    faded = tl.load(p_term + 4 * L)
    terms = tl.where(o_row[:, None] > o_row[None, :], faded[None, :], tl.where(valid, grad_sums, 0.0)[None, :])
    kept = tl.load(p_terms + i_system * (TERMS * L) + 5 * L) * tl.load(p_decay + i_system)
    grad_log_decay = tl.sum(terms, axis=1) + kept
    tl.store(p_grad_log_decay + place, grad_log_decay.to(p_grad_log_decay.dtype.element_ty), valid)


@triton.jit
def _tokens(p_cu_seqlens, p_first_chunk, p_sequences, i_chunk, L: tl.constexpr):
    """The first token of a chunk (int64), and how many tokens its sequence has from there on."""
    i_sequence = tl.load(p_sequences + i_chunk)
    first = tl.load(p_cu_seqlens + i_sequence) + (i_chunk.to(tl.int32) - tl.load(p_first_chunk + i_sequence)) * L
    return first.to(tl.int64), tl.load(p_cu_seqlens + i_sequence + 1) - first


@triton.jit
def _plus(b_x, b_y):
    """The sum of a product and another matrix, in a way that does not make the latter the product's accumulator."""
    return tl.fma(b_x, tl.full(b_x.shape, 1.0, tl.float32), b_y)


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
def _ratios(high, low, mask, EXACT: tl.constexpr):
    """e^(sum of the row's token - sum of the column's) where the mask lets it, else 0."""
    differences = high[:, None] - high[None, :]
    if EXACT:
        # Sums reach -1000s: as two fp32 numbers each, their differences keep the precision of the single terms.
        differences += low[:, None] - low[None, :]
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

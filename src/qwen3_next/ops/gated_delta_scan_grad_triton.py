"""The kernels of the gated delta rule's gradient; gated_delta_grad_triton.py launches them and has the equations.

No transposed result of a product is ever the left operand of another: Triton 3.4 to 3.7.0 miscompiles that for Hopper.
Where a transpose is needed, it is a product of its own, with the operands in the other order.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# (the four: launches, rounded sizes and loops of kernels, which Triton types as constants or not at all)

import triton
import triton.language as tl

from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.gated_delta_scan_triton import load_rows, load_square, scan_kernel, store_state


@triton.jit
def walks_kernel(
    p_q, p_k, p_v, p_grad_output, p_inverse, p_attention, p_scales, p_decay, p_initial, p_grad_final,
    p_states, p_written, p_grad_states, p_grad_alone, p_grad_initial,
    p_cu_seqlens, p_first_chunk, p_first_sequence, p_sequences, initial_stride, longest,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV columns of its state: half of the programs walk forth, half of them back.

    Neither walk needs the other, and with one sequence, one alone would leave half of the card idle.
    """
    columns: tl.constexpr = (DV + BV - 1) // BV
    if tl.program_id(0) < columns:
        scan_kernel(
            p_q, p_k, p_v, p_inverse, None, p_scales, p_decay, None, None,
            None, p_written, p_states, p_initial, None, None, None, None,
            p_cu_seqlens, p_first_chunk, p_first_sequence, p_sequences, initial_stride, 0, longest, 0,
            Q_ROW, K_ROW, V_ROW, HK, HV, DK, DV, BK, BV, L, BS=0, SPLIT=False, SLOTS=False,
        )  # fmt: skip
    else:
        _walk_back(
            p_q, p_k, p_grad_output, p_inverse, p_attention, p_scales, p_decay, p_grad_final,
            p_grad_states, p_grad_alone, p_grad_initial, p_cu_seqlens, p_first_chunk, p_sequences,
            tl.program_id(0) - columns, Q_ROW, K_ROW, HK, HV, DK, DV, BK, BV, L,
        )  # fmt: skip


@triton.jit
def _walk_back(
    p_q, p_k, p_grad_output, p_inverse, p_attention, p_scales, p_decay, p_grad_final,
    p_grad_states, p_grad_alone, p_grad_initial, p_cu_seqlens, p_first_chunk, p_sequences, i_column,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """From the last chunk to the first; equations 1 to 3.

    It keeps the transpose of the state's gradient, so that each product of the serial chain finds the result of the
    one before it in registers, as its left operand.
    """
    i_head = tl.program_id(1)
    i_sequence = tl.load(p_sequences + tl.program_id(2))
    begin = tl.load(p_cu_seqlens + i_sequence)
    length = tl.load(p_cu_seqlens + i_sequence + 1) - begin
    first_chunk = tl.load(p_first_chunk + i_sequence).to(tl.int64)
    begin_row = begin.to(tl.int64)
    o_column, o_row, o_k = i_column * BV + tl.arange(0, BV), tl.arange(0, L), tl.arange(0, BK)
    p_k += i_head // (HV // HK) * DK
    p_q += i_head // (HV // HK) * DK
    p_grad_output += i_head * DV
    o_state = o_k[None, :] * DV + o_column[:, None]
    is_state = (o_column < DV)[:, None] & (o_k < DK)[None, :]
    i_state = (i_sequence.to(tl.int64) * HV + i_head) * (DK * DV)
    b_state = tl.zeros([BV, BK], dtype=tl.float32)
    if p_grad_final is not None:
        b_state += tl.load(p_grad_final + i_state + o_state, is_state, other=0.0)
    b_identity = (o_row[:, None] == o_row[None, :]).to(p_grad_output.dtype.element_ty)

    chunks = tl.cdiv(length, L)
    # Would not be fetched ahead by the compiler, because no product has it as an operand.
    decay = tl.load(p_decay + (first_chunk + chunks - 1) * HV + i_head)
    for i_back in range(chunks):
        number = chunks - 1 - i_back
        row, count = begin_row + number * L, length - number * L
        i_system = (first_chunk + number) * HV + i_head
        p_scale = p_scales + i_system * (4 * L) + o_row
        b_k = load_rows(p_k, row, K_ROW, o_k, DK, count, L)
        b_q = load_rows(p_q, row, Q_ROW, o_k, DK, count, L)
        b_grad_output = load_rows(p_grad_output, row, HV * DV, o_column, DV, count, L)
        b_attention = load_square(p_attention + i_system * (L * L), L)
        b_inverse = load_square(p_inverse + i_system * (L * L), L)
        next_decay = tl.load(p_decay + tl.where(number > 0, i_system - HV, i_system))
        store_state(p_grad_states + i_system * (DK * DV), b_state, o_column, DV, DK, BK)
        # The transpose by way of a product, because that is how it comes out of shared memory without a copy.
        b_output = dot(tl.trans(b_grad_output), b_identity)
        b_written = dot(b_output.to(b_k.dtype), b_attention)
        # By `fma`, for a sum would be made the accumulator of a product, and what scales one is not fetched ahead.
        left = tl.broadcast_to(tl.load(p_scale + 2 * L)[None, :], [BV, L])
        b_written = tl.fma(dot(b_state.to(b_k.dtype), tl.trans(b_k)), left, b_written)
        b_output *= tl.load(p_scale + 3 * L)[None, :]
        b_state = dot(b_output.to(b_k.dtype), b_q, b_state * decay)
        b_alone = dot(b_written.to(b_k.dtype), b_inverse)
        b_reads = b_alone * -(tl.load(p_scale) * tl.load(p_scale + L))[None, :]
        b_state = dot(b_reads.to(b_k.dtype), b_k, b_state)
        o_alone = ((row + o_row) * HV + i_head)[None, :] * DV + o_column[:, None]
        is_alone = (o_row < count)[None, :] & (o_column < DV)[:, None]
        tl.store(p_grad_alone + o_alone, b_alone.to(p_grad_alone.dtype.element_ty), is_alone)
        decay = next_decay
    if p_grad_initial is not None:
        store_state(p_grad_initial + i_state, b_state, o_column, DV, DK, BK)


@triton.jit
def chunk_gradients_kernel(
    p_q, p_k, p_v, p_grad_output, p_written, p_grad_alone, p_states, p_grad_states, p_attention, p_sums, p_scales,
    p_decay, p_rstd_q, p_rstd_k, p_grad_q, p_grad_k, p_grad_log_decay, p_grad_beta, p_terms,
    p_cu_seqlens, p_first_chunk, p_sequences, Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head; equations 4 to 8. Leaves the gradient of v where it found that of X."""
    i_chunk, i_key = tl.program_id(0), tl.program_id(1)
    i_sequence = tl.load(p_sequences + i_chunk)
    offset = (i_chunk - tl.load(p_first_chunk + i_sequence)) * L
    p_border = p_cu_seqlens + i_sequence
    i_chunk = i_chunk.to(tl.int64)
    p_q += i_key * DK
    p_k += i_key * DK
    p_rstd_q += i_key
    p_rstd_k += i_key
    EXACT: tl.constexpr = p_q.dtype.element_ty == tl.float32
    _query_gradients(
        p_q, p_k, p_grad_output, p_written, p_states, p_attention, p_sums, p_scales, p_rstd_q, p_rstd_k,
        p_grad_q, p_terms, p_border, offset, i_chunk, i_key, Q_ROW, K_ROW, HK, HV, DK, DV, BK, BV, L, EXACT,
    )  # fmt: skip
    tl.debug_barrier()
    _key_gradients(
        p_q, p_k, p_v, p_grad_output, p_written, p_grad_alone, p_states, p_grad_states, p_sums, p_scales,
        p_rstd_q, p_rstd_k, p_grad_k, p_terms, p_border, offset, i_chunk, i_key,
        Q_ROW, K_ROW, V_ROW, HK, HV, DK, DV, BK, BV, L, EXACT,
    )  # fmt: skip
    tl.debug_barrier()
    token, count = _tokens(p_border, offset)
    for i_head in range(i_key * (HV // HK), (i_key + 1) * (HV // HK)):
        i_system = i_chunk * HV + i_head
        place = token * HV + i_head
        _gate_gradients(
            p_terms + i_system * (9 * L), p_scales + i_system * (4 * L), tl.load(p_decay + i_system),
            p_grad_log_decay + place, p_grad_beta + place, count, HV, L,
        )  # fmt: skip


@triton.jit
def _tokens(p_border, offset):
    """The first token of a chunk, and how many tokens its sequence has from there on.

    Loaded anew for each step: from values that it knows to be the same, the compiler would find the addresses of all
    steps at once and keep them in registers, of which there are too few.
    """
    first = tl.load(p_border) + offset
    return first.to(tl.int64), tl.load(p_border + 1) - first


@triton.jit
def _query_gradients(
    p_q, p_k, p_grad_output, p_written, p_states, p_attention, p_sums, p_scales, p_rstd_q, p_rstd_k,
    p_grad_q, p_terms, p_border, offset, i_chunk, i_key, Q_ROW: tl.constexpr, K_ROW: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Equation 5, and terms 0 to 2 of the gradients of the gates."""
    o_row, o_k = tl.arange(0, L), tl.arange(0, BK)
    o_line, o_other = o_row[:, None], o_row[None, :]
    b_grad = tl.zeros([L, BK], dtype=tl.float32)
    for i_head in range(i_key * (HV // HK), (i_key + 1) * (HV // HK)):
        i_system = i_chunk * HV + i_head
        token, count = _tokens(p_border, offset)
        p_term = p_terms + i_system * (9 * L) + o_row
        b_attention = tl.zeros([L, L], dtype=tl.float32)
        b_read = tl.zeros([L, BK], dtype=tl.float32)
        for i_value in range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_output = load_rows(p_grad_output + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_written = load_rows(p_written + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_attention = dot(b_output, tl.trans(b_written), b_attention)
            b_state = _load_state(p_states + i_system * (DK * DV), o_k, o_column, DK, DV)
            b_read = dot(b_output, tl.trans(b_state), b_read)
        b_read *= tl.load(p_scales + i_system * (4 * L) + 3 * L + o_row)[:, None]
        b_q = load_rows(p_q, token, Q_ROW, o_k, DK, count, L)
        tl.store(p_term + 2 * L, tl.sum(b_q.to(tl.float32) * b_read, axis=1))
        b_grad += b_read
        token, count = _tokens(p_border, offset)
        b_given = load_square(p_attention + i_system * (L * L), L).to(tl.float32)
        b_decays = tl.where(o_line > o_other, b_attention * b_given, 0.0)
        tl.store(p_term, tl.sum(b_decays, axis=1))
        tl.store(p_term + L, tl.sum(b_decays, axis=0))
        b_attention *= _ratios(p_sums + token * HV + i_head, o_line, o_other, o_line >= o_other, count, HV, EXACT)
        b_attention *= _load_scales(p_rstd_q + token * HK, HK, count, L)[:, None]
        b_attention *= _load_scales(p_rstd_k + token * HK, HK, count, L)[None, :]
        b_k = load_rows(p_k, token, K_ROW, o_k, DK, count, L)
        b_grad = dot(b_attention.to(b_k.dtype), b_k, b_grad)
    token, count = _tokens(p_border, offset)
    b_q = load_rows(p_q, token, Q_ROW, o_k, DK, count, L)
    rstd_q = _load_scales(p_rstd_q + token * HK, HK, count, L)
    _store_key(p_grad_q + (token * HK + i_key) * DK, b_grad, b_q, rstd_q * rstd_q * DK, count, HK, DK, BK)


@triton.jit
def _key_gradients(
    p_q, p_k, p_v, p_grad_output, p_written, p_grad_alone, p_states, p_grad_states, p_sums, p_scales,
    p_rstd_q, p_rstd_k, p_grad_k, p_terms, p_border, offset, i_chunk, i_key,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Equations 4 and 6, and terms 3 to 8 of the gradients of the gates."""
    o_row, o_k = tl.arange(0, L), tl.arange(0, BK)
    o_line, o_other = o_row[:, None], o_row[None, :]
    b_grad = tl.zeros([L, BK], dtype=tl.float32)
    for i_head in range(i_key * (HV // HK), (i_key + 1) * (HV // HK)):
        i_system = i_chunk * HV + i_head
        token, count = _tokens(p_border, offset)
        p_scale = p_scales + i_system * (4 * L) + o_row
        p_values, p_alone = p_written + i_head * DV, p_grad_alone + i_head * DV
        p_term = p_terms + i_system * (9 * L) + o_row

        # From the products of the values among themselves.
        b_system = tl.zeros([L, L], dtype=tl.float32)
        along_v = tl.zeros([L], dtype=tl.float32)
        for i_value in range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_alone = load_rows(p_alone, token, HV * DV, o_column, DV, count, L)
            b_v = load_rows(p_v + i_head * DV, token, V_ROW, o_column, DV, count, L)
            along_v += tl.sum(b_alone.to(tl.float32) * b_v.to(tl.float32), axis=1)
            b_written = load_rows(p_values, token, HV * DV, o_column, DV, count, L)
            b_system = dot(b_alone, tl.trans(b_written), b_system)
        tl.store(p_term + 3 * L, along_v)
        b_k = load_rows(p_k, token, K_ROW, o_k, DK, count, L)
        b_system *= _ratios(p_sums + token * HV + i_head, o_line, o_other, o_line > o_other, count, HV, EXACT)
        b_system *= _load_scales(p_rstd_k + token * HK, HK, count, L)[:, None]
        b_system *= _load_scales(p_rstd_k + token * HK, HK, count, L)[None, :]
        b_corrections = dot(b_k, tl.trans(b_k)) * b_system
        tl.store(p_term + 4 * L, tl.sum(b_corrections, axis=1))
        beta = tl.load(p_scale)
        tl.store(p_term + 5 * L, tl.sum(b_corrections * beta[:, None], axis=0))
        b_grad = dot((b_system * -beta[:, None]).to(b_k.dtype), b_k, b_grad)

        # The transposes: what later tokens give to earlier ones.
        token, count = _tokens(p_border, offset)
        b_system, b_attention = tl.zeros([L, L], dtype=tl.float32), tl.zeros([L, L], dtype=tl.float32)
        for i_value in range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_written = load_rows(p_values, token, HV * DV, o_column, DV, count, L)
            b_alone = load_rows(p_alone, token, HV * DV, o_column, DV, count, L)
            b_system = dot(b_written, tl.trans(b_alone), b_system)
            b_output = load_rows(p_grad_output + i_head * DV, token, HV * DV, o_column, DV, count, L)
            b_attention = dot(b_written, tl.trans(b_output), b_attention)
        b_ratios = _ratios(p_sums + token * HV + i_head, o_other, o_line, o_line <= o_other, count, HV, EXACT)
        b_ratios *= _load_scales(p_rstd_k + token * HK, HK, count, L)[:, None]
        b_attention *= b_ratios
        b_system *= tl.where(o_line < o_other, -b_ratios, 0.0)
        b_attention *= _load_scales(p_rstd_q + token * HK, HK, count, L)[None, :]
        b_q = load_rows(p_q, token, Q_ROW, o_k, DK, count, L)
        b_grad = dot(b_attention.to(b_q.dtype), b_q, b_grad)
        b_system *= (_load_scales(p_rstd_k + token * HK, HK, count, L) * tl.load(p_scale))[None, :]
        b_k = load_rows(p_k, token, K_ROW, o_k, DK, count, L)
        b_grad = dot(b_system.to(b_k.dtype), b_k, b_grad)

        # From the state that enters.
        token, count = _tokens(p_border, offset)
        b_read = tl.zeros([L, BK], dtype=tl.float32)
        for i_value in range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_alone = load_rows(p_alone, token, HV * DV, o_column, DV, count, L)
            b_state = _load_state(p_states + i_system * (DK * DV), o_k, o_column, DK, DV)
            b_read = dot(b_alone, tl.trans(b_state), b_read)
            beta = tl.load(p_scale)
            is_value = (o_line < count) & (o_column < DV)[None, :]
            p_place = p_alone + token * (HV * DV) + (o_line * (HV * DV) + o_column[None, :])
            tl.store(p_place, (b_alone.to(tl.float32) * beta[:, None]).to(b_alone.dtype), is_value)
        b_read *= tl.load(p_scale + L)[:, None]
        b_k = load_rows(p_k, token, K_ROW, o_k, DK, count, L)
        tl.store(p_term + 6 * L, tl.sum(b_k.to(tl.float32) * b_read, axis=1))
        b_grad -= tl.load(p_scale)[:, None] * b_read

        # From the state that leaves.
        token, count = _tokens(p_border, offset)
        b_write = tl.zeros([L, BK], dtype=tl.float32)
        kept = 0.0
        for i_value in range(0, DV, BV):
            o_column = i_value + tl.arange(0, BV)
            b_written = load_rows(p_values, token, HV * DV, o_column, DV, count, L)
            b_state = _load_state(p_states + i_system * (DK * DV), o_k, o_column, DK, DV)
            b_grad_state = _load_state(p_grad_states + i_system * (DK * DV), o_k, o_column, DK, DV)
            kept += tl.sum(b_state.to(tl.float32) * b_grad_state.to(tl.float32))
            b_write = dot(b_written, tl.trans(b_grad_state), b_write)
        b_write *= tl.load(p_scale + 2 * L)[:, None]
        b_k = load_rows(p_k, token, K_ROW, o_k, DK, count, L)
        tl.store(p_term + 7 * L, tl.sum(b_k.to(tl.float32) * b_write, axis=1))
        tl.store(p_terms + i_system * (9 * L) + 8 * L, kept)
        b_grad += b_write
    token, count = _tokens(p_border, offset)
    b_k = load_rows(p_k, token, K_ROW, o_k, DK, count, L)
    rstd_k = _load_scales(p_rstd_k + token * HK, HK, count, L)
    _store_key(p_grad_k + (token * HK + i_key) * DK, b_grad, b_k, rstd_k * rstd_k, count, HK, DK, BK)


@triton.jit
def _gate_gradients(p_terms, p_scales, decay, p_grad_log_decay, p_grad_beta, count, HV: tl.constexpr, L: tl.constexpr):
    """Equations 7 and 8 for one value head, from their terms."""
    o_row = tl.arange(0, L)
    valid, beta = o_row < count, tl.load(p_scales + o_row)
    p_term = p_terms + o_row
    mutual, forgotten = tl.load(p_term + 4 * L), tl.load(p_term + 6 * L)
    grad_beta = tl.load(p_term + 3 * L) - mutual - forgotten
    tl.store(p_grad_beta + o_row * HV, grad_beta.to(p_grad_beta.dtype.element_ty), valid)
    grad_sums = tl.load(p_term) - tl.load(p_term + L) + tl.load(p_term + 2 * L)
    grad_sums += tl.load(p_term + 5 * L) - beta * (mutual + forgotten)
    # The decay of token t is in the sums of t and all after it, and in the fading of what those before it wrote.
    faded = tl.load(p_term + 7 * L)
    terms = tl.where(o_row[:, None] > o_row[None, :], faded[None, :], tl.where(valid, grad_sums, 0.0)[None, :])
    kept = tl.load(p_terms + 8 * L) * decay
    grad_log_decay = tl.sum(terms, axis=1) + kept
    tl.store(p_grad_log_decay + o_row * HV, grad_log_decay.to(p_grad_log_decay.dtype.element_ty), valid)


@triton.jit
def _load_scales(p_x, ROW: tl.constexpr, count, L: tl.constexpr):
    """One number for each row; 0 beyond `count`."""
    return tl.load(p_x + tl.arange(0, L) * ROW, tl.arange(0, L) < count, other=0.0)


@triton.jit
def _load_state(p_state, o_k, o_column, DK: tl.constexpr, DV: tl.constexpr):
    """Columns of a state; zeros beyond its widths."""
    mask = (o_k < DK)[:, None] & (o_column < DV)[None, :]
    return tl.load(p_state + o_k[:, None] * DV + o_column[None, :], mask, other=0.0)


@triton.jit
def _ratios(p_sums, o_later, o_earlier, mask, count, HV: tl.constexpr, EXACT: tl.constexpr):
    """e^(sums of the later token - sums of the earlier), where the mask lets it; 0 elsewhere and beyond the tokens."""
    later = tl.load(p_sums + o_later * HV, o_later < count, other=0.0)
    earlier = tl.load(p_sums + o_earlier * HV, o_earlier < count, other=0.0)
    differences = later.to(tl.float32) - earlier.to(tl.float32)
    if EXACT:
        # Sums reach -1000s: as two fp32 numbers each, their differences keep the precision of the single terms.
        low = (later - later.to(tl.float32).to(tl.float64)).to(tl.float32)
        differences += low - (earlier - earlier.to(tl.float32).to(tl.float64)).to(tl.float32)
    return tl.exp(tl.where(mask & (o_later < count), differences, float("-inf")))


@triton.jit
def _store_key(p_grad, b_grad, b_x, scale, count, HK: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr):
    """The gradient of x from that of x / |x|, which already has the factor 1 / |x|: less its part along x."""
    o_k = tl.arange(0, BK)
    along = tl.sum(b_x.to(tl.float32) * b_grad, axis=1) * scale
    b_grad -= b_x.to(tl.float32) * along[:, None]
    o_line = tl.arange(0, b_grad.shape[0])[:, None]
    is_key = (o_line < count) & (o_k < DK)[None, :]
    tl.store(p_grad + (o_line * (HK * DK) + o_k[None, :]), b_grad.to(p_grad.dtype.element_ty), is_key)

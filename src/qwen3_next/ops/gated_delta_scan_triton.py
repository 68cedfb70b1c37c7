"""The kernels that walk over the chunks of the gated delta rule; gated_delta_chunk_triton.py launches them.

They keep S^T, not S: every product of the serial chain then finds the result of the one before it in registers, as its
left operand, and nothing on the chain goes through shared memory.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# (the four: launches, rounded sizes and loops of kernels, which Triton types as constants or not at all)

import triton
import triton.language as tl

from qwen3_next.ops.common_triton import dot


@triton.jit
def load_rows(p_x, token, ROW: tl.constexpr, o_column, width, count, L: tl.constexpr):
    """`[L, columns]` from `token` (int64) on; zeros beyond `count` rows and `width` columns.

    ROW, the distance of two rows, is a constant so that one register addresses them all.
    """
    o_row = tl.arange(0, L)
    mask = (o_row < count)[:, None] & (o_column < width)[None, :]
    return tl.load(p_x + token * ROW + (o_row[:, None] * ROW + o_column[None, :]), mask, other=0.0)


@triton.jit
def load_square(p_x, L: tl.constexpr):
    """A whole `[L, L]` matrix."""
    return tl.load(p_x + tl.arange(0, L)[:, None] * L + tl.arange(0, L)[None, :])


@triton.jit
def _advance(b_state, b_k, b_v, b_inverse, p_scales, left, decay, L: tl.constexpr):
    """What the tokens of a chunk write, `[BV, L]`, and the state after them; equations 3 and 5.

    `left` is by how much each write has faded then, and `decay` by how much the state has.
    """
    beta = tl.load(p_scales + tl.arange(0, L))
    survived = tl.load(p_scales + L + tl.arange(0, L))
    # v^T by way of a product, because that is how a matrix comes out of shared memory without a copy in registers.
    b_value = dot(tl.trans(b_v), (tl.arange(0, L)[:, None] == tl.arange(0, L)[None, :]).to(b_v.dtype))
    b_read = dot(b_state.to(b_k.dtype), tl.trans(b_k)) * survived[None, :]
    b_error = beta[None, :] * (b_value - b_read)
    b_written = dot(b_error.to(b_k.dtype), tl.trans(b_inverse))
    return b_written, dot((b_written * left[None, :]).to(b_k.dtype), b_k, b_state * decay)


@triton.jit
def store_state(p_state, b_state, o_column, width, DK: tl.constexpr, BK: tl.constexpr):
    """S^T `[BV, BK]` to S `[DK, width]`."""
    o_k = tl.arange(0, BK)
    mask = (o_column < width)[:, None] & (o_k < DK)[None, :]
    tl.store(p_state + o_k[None, :] * width + o_column[:, None], b_state.to(p_state.dtype.element_ty), mask)


@triton.jit
def walk_kernel(
    p_q, p_k, p_v, p_inverse, p_attention, p_scales, p_decay, p_output, p_initial, p_final, p_slots, p_targets,
    p_cu_parts, p_first_chunk, p_first_part, initial_stride, final_stride,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, HK: tl.constexpr, HV: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV columns of its state, for any widths and dtypes: outputs and states.

    The sequence is walked part by part; chunks start anew with each, and the state after part i goes to `targets[i]`,
    or to i where there are no targets. Where there is no `first_part`, sequences are parts; one that has no tokens
    then leaves its target alone.
    """
    i_column, i_head, i_sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_column, o_row, o_k = i_column * BV + tl.arange(0, BV), tl.arange(0, L), tl.arange(0, BK)
    p_k += i_head // (HV // HK) * DK
    p_q += i_head // (HV // HK) * DK
    p_v += i_head * DV
    b_state = tl.zeros([BV, BK], dtype=tl.float32)
    if p_initial is not None:
        slot = tl.cast(i_sequence if p_slots is None else tl.load(p_slots + i_sequence), tl.int64)
        p_source = p_initial + slot * initial_stride + i_head * (DK * DV)
        is_state = (o_column < DV)[:, None] & (o_k < DK)[None, :]
        b_state += tl.load(p_source + o_k[None, :] * DV + o_column[:, None], is_state, other=0.0).to(tl.float32)
    first_part, last_part = i_sequence, i_sequence + 1
    if p_first_part is not None:
        first_part, last_part = tl.load(p_first_part + i_sequence), tl.load(p_first_part + i_sequence + 1)
    for i_part in range(first_part, last_part):
        begin = tl.load(p_cu_parts + i_part)
        length = tl.load(p_cu_parts + i_part + 1) - begin
        first_system = tl.load(p_first_chunk + i_part).to(tl.int64) * HV + i_head
        chunks = tl.cdiv(length, L)
        # These two would not be fetched ahead by the compiler, because no product has them as an operand.
        q_scale = tl.load(p_scales + first_system * (4 * L) + 3 * L + o_row, (o_row < L) & (chunks > 0), other=0.0)
        decay = tl.load(p_decay + first_system, chunks > 0, other=0.0)
        for number in range(chunks):
            row, count = begin.to(tl.int64) + number * L, length - number * L
            i_system = first_system + number * HV
            p_scale = p_scales + i_system * (4 * L)
            b_k = load_rows(p_k, row, K_ROW, o_k, DK, count, L)
            b_v = load_rows(p_v, row, V_ROW, o_column, DV, count, L)
            b_q = load_rows(p_q, row, Q_ROW, o_k, DK, count, L)
            b_inverse = load_square(p_inverse + i_system * (L * L), L)
            b_attention = load_square(p_attention + i_system * (L * L), L)
            left = tl.load(p_scale + 2 * L + o_row)
            i_next = tl.where(number + 1 < chunks, i_system + HV, i_system)
            next_decay = tl.load(p_decay + i_next)
            next_q_scale = tl.load(p_scales + i_next * (4 * L) + 3 * L + o_row)
            b_output = dot(b_state.to(b_q.dtype), tl.trans(b_q)) * q_scale[None, :]
            b_written, b_state = _advance(b_state, b_k, b_v, b_inverse, p_scale, left, decay, L)
            b_output = dot(b_written.to(b_q.dtype), tl.trans(b_attention), b_output)
            o_output = ((row + o_row) * HV + i_head)[None, :] * DV + o_column[:, None]
            is_output = (o_row < count)[None, :] & (o_column < DV)[:, None]
            tl.store(p_output + o_output, b_output.to(p_output.dtype.element_ty), is_output)
            q_scale, decay = next_q_scale, next_decay
        if p_targets is None or p_first_part is not None or length > 0:
            target = tl.cast(i_part if p_targets is None else tl.load(p_targets + i_part), tl.int64)
            store_state(p_final + target * final_stride + i_head * (DK * DV), b_state, o_column, DV, DK, BK)

"""The chunked gated delta rule on the GPU: a kernel that solves all chunks at once, and one that walks over them.

docs/gated_delta_rule.md, in its names. Nothing is normalised in memory: 1 / sqrt(|x|^2 + 1e-6) of q and k are scales of
rows of the products. Shapes: G chunks of at most 64 tokens, `L` = 64; rows beyond a chunk's tokens are zero.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# (the four: launches, rounded sizes and loops of kernels, which Triton types as constants or not at all)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.common_triton import dot, multiprocessors
from qwen3_next.ops.gated_delta_scan_triton import combine_kernel, load_rows, scan_kernel, summarise_kernel
from qwen3_next.ops.segments import Parts, Segments
from qwen3_next.ops.snapshots import Snapshots

CHUNK = 64
"""Tokens of a chunk; `segments.cut(CHUNK)` says where each chunk stands."""


class ChunkSystems(NamedTuple):
    """What the chunks of each value head are, independently of any state.

    Attributes:
        inverse: T = (I + tril(beta_i e^(sums_i - sums_j) k_i k_j, -1))^-1 with k normalised, beta not in its columns.
        attention: P = tril(e^(sums_i - sums_j) q_i k_j) with q and k normalised and q divided by sqrt(Dk).
        sums: of log_decay from the first token of the chunk up to and with this token; fp64.
        rstd_q: 1 / sqrt(|q|^2 + 1e-6) / sqrt(Dk).
        rstd_k: 1 / sqrt(|k|^2 + 1e-6).
        scales: for the walk: beta, rstd_k e^sums, rstd_k e^(last sum - sums) and rstd_q e^sums; 0 beyond the tokens.
        decay: e^(last sum).
    """

    inverse: Float[Tensor, "G Hv L L"]
    attention: Float[Tensor, "G Hv L L"]
    sums: Float[Tensor, "T Hv"]
    rstd_q: Float[Tensor, "T Hk"]
    rstd_k: Float[Tensor, "T Hk"]
    scales: Float[Tensor, "G Hv 4 L"]
    decay: Float[Tensor, "G Hv"]


class ScanResult(NamedTuple):
    """What the walk over the chunks finds.

    Attributes:
        output: in `v.dtype`.
        final_state: fp32.
    """

    output: Float[Tensor, "T Hv Dv"]
    final_state: Float[Tensor, "N Hv Dk Dv"]


def solve_chunks(
    q: Float[Tensor, "T Hk Dk"],
    k: Float[Tensor, "T Hk Dk"],
    log_decay: Float[Tensor, "T Hv"],
    beta: Float[Tensor, "T Hv"],
    segments: Segments,
) -> ChunkSystems:
    """Solve the triangular system of every chunk; matrices in the dtype of q. Equations 3 and 4."""
    q, k, log_decay, beta = by_token(q), by_token(k), log_decay.contiguous(), beta.contiguous()
    chunks = segments.cut(CHUNK)
    tokens, key_heads, width = q.shape
    value_heads = beta.shape[1]
    matrices = q.new_empty(2, chunks.count, value_heads, CHUNK, CHUNK)
    sums = q.new_empty(tokens, value_heads, dtype=torch.float64)
    rstd = q.new_empty(2, tokens, key_heads, dtype=torch.float32)
    scales = q.new_empty(chunks.count, value_heads, 4, CHUNK, dtype=torch.float32)
    decay = q.new_empty(chunks.count, value_heads, dtype=torch.float32)
    if chunks.count:
        scratch = matrices[0].view(torch.float32)
        # No entry of T is above 1, so that fp16 has two digits more for its factors than bf16 has for the result.
        factor = tl.float32 if q.dtype == torch.float32 else tl.float16
        _solve_kernel[(chunks.count, key_heads)](
            *(q, k, log_decay, beta, *matrices, sums, *rstd, scales, decay, scratch),
            *(chunks.cu_seqlens, chunks.first, chunks.sequences, width**-0.5),
            Q_ROW=q.stride(0), K_ROW=k.stride(0),
            HK=key_heads, HV=value_heads, DK=width, BK=padded_width(width), L=CHUNK,
            SCRATCH=scratch.stride(1), FACTOR=factor, num_warps=4, num_stages=1,
        )  # fmt: skip
    return ChunkSystems(*matrices, sums, *rstd, scales, decay)


def scan_chunks(
    q: Float[Tensor, "T Hk Dk"],
    k: Float[Tensor, "T Hk Dk"],
    v: Float[Tensor, "T Hv Dv"],
    beta: Float[Tensor, "T Hv"],
    systems: ChunkSystems,
    segments: Segments,
    initial_state: Float[Tensor, "N Hv Dk Dv"] | None,
) -> ScanResult:
    """Carry the states through the chunks of their sequences."""
    shape = (segments.count, v.shape[1], k.shape[2], v.shape[2])
    initial_state = None if initial_state is None else initial_state.contiguous()
    if 0 not in segments.lengths:
        final_state = v.new_empty(shape, dtype=torch.float32)
    elif initial_state is None:
        final_state = v.new_zeros(shape, dtype=torch.float32)
    else:
        final_state = initial_state.float().clone()
    output = walk(q, k, v, systems, segments, States(initial_state, final_state, None, None))
    return ScanResult(output, final_state)


class States(NamedTuple):
    """Where a walk finds the states that enter sequences and leaves those that leave them; by sequence or by slot."""

    initial: Float[Tensor, "M Hv Dk Dv"] | None
    final: Float[Tensor, "M Hv Dk Dv"]
    slots: Int[Tensor, "N"] | None
    snapshots: Snapshots | None


def walk(
    q: Tensor, k: Tensor, v: Tensor, systems: ChunkSystems, segments: Segments, places: States
) -> Float[Tensor, "T Hv Dv"]:
    """The output of every token; final states and snapshots go to `places`."""
    q, k, v = by_token(q), by_token(k), by_token(v)
    output = v.new_empty(v.shape)
    if segments.total == 0:
        return output
    (_, key_heads, dk), (_, value_heads, dv) = k.shape, v.shape
    block, warps, stages = _configuration(dk, dv, v.dtype)
    pieces = segments.cut(_piece_size(segments, value_heads, dk, dv, block))
    chunks = segments.cut(CHUNK)
    initial, slots = places.initial, places.slots
    split = pieces.count > segments.count - segments.lengths.count(0)
    if split:
        initial = _entering_states(k, v, systems, chunks, pieces, places)
    snapshots = places.snapshots
    taken = 0 if snapshots is None else len(snapshots.positions)
    after, targets = (None, None) if snapshots is None else (snapshots.after, snapshots.slots)
    scan_kernel[(triton.cdiv(dv, block), value_heads, pieces.count)](
        *(q, k, v, systems.inverse, systems.attention, systems.scales, systems.decay, systems.sums, systems.rstd_k),
        *(output, None, None, initial, places.final, slots, after, targets),
        *(chunks.cu_seqlens, chunks.first, pieces.first, pieces.sequences),
        *(0 if initial is None else initial.stride(0), places.final.stride(0), pieces.size, taken),
        Q_ROW=q.stride(0), K_ROW=k.stride(0), V_ROW=v.stride(0),
        HK=key_heads, HV=value_heads, DK=dk, DV=dv, BK=padded_width(dk), BV=block, L=CHUNK,
        BS=triton.next_power_of_2(taken) if taken else 0, SPLIT=split, SLOTS=slots is not None,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return output


def _entering_states(
    k: Tensor, v: Tensor, systems: ChunkSystems, chunks: Parts, pieces: Parts, places: States
) -> Float[Tensor, "P Hv Dk Dv"]:
    """The state that enters each piece: all pieces find `[B | M]` at once, then one short walk combines them."""
    (_, key_heads, dk), (_, value_heads, dv) = k.shape, v.shape
    block, warps, stages = _configuration(dk, dv, v.dtype)
    values, padded = triton.cdiv(dv, block) * block, padded_width(dk)
    summaries = v.new_empty(pieces.count, value_heads, dk, values + padded, dtype=torch.float32)
    shape = {"HV": value_heads, "DK": dk, "DV": dv, "BK": padded, "VALUES": values}
    summarise_kernel[(triton.cdiv(values + padded, block), value_heads, pieces.count)](
        *(k, v, systems.inverse, systems.scales, systems.decay, summaries),
        *(chunks.cu_seqlens, chunks.first, pieces.first, pieces.sequences, pieces.size),
        K_ROW=k.stride(0), V_ROW=v.stride(0), HK=key_heads, BV=block, L=CHUNK,
        num_warps=warps, num_stages=stages, **shape,
    )  # fmt: skip
    entering = v.new_empty(pieces.count, value_heads, dk, dv, dtype=torch.float32)
    initial = places.initial
    combine_kernel[(triton.cdiv(dv, _COMBINED), value_heads, pieces.first.shape[0] - 1)](
        *(summaries, initial, entering, pieces.first, places.slots, 0 if initial is None else initial.stride(0)),
        BV=_COMBINED, SLOTS=places.slots is not None, num_warps=8, num_stages=1, **shape,
    )  # fmt: skip
    return entering


_COMBINED = 16
"""Columns of the state in a program that combines pieces."""


def _configuration(dk: int, dv: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Columns of the state in a program of the walk, warps, stages of its loads. For H100 and H200."""
    if dtype == torch.float32:
        return 16, 8, 1
    return min(32, padded_width(dv)), 8 if dk > 128 else 4, 2


_MOST_PIECES = 1
"""Into how many pieces a sequence may be cut. 1, never: measured at 16:32 heads, cutting pays for itself at best."""


def _piece_size(segments: Segments, heads: int, dk: int, dv: int, block: int) -> int:
    """Tokens of the pieces that walk side by side: a sequence as a whole, unless that leaves most of the card idle.

    Cutting has a price: finding `[B | M]` takes the chain of products of two walks, without their outputs.
    """
    whole = triton.cdiv(segments.max_length, CHUNK)
    programs = triton.cdiv(dv, block) * heads * max(1, segments.total // max(1, segments.max_length))
    most = min(_MOST_PIECES, 2 * multiprocessors(segments.device) // programs, whole // 8)
    return triton.cdiv(whole, most if most > 1 and dk <= 128 else 1) * CHUNK


def by_token(x: Float[Tensor, "T H D"]) -> Float[Tensor, "T H D"]:
    """x, or a copy, whose heads of one token lie one after the other; tokens may be further apart."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def padded_width(width: int) -> int:
    """The power of two, at least 16, that a product needs in place of `width`."""
    return max(16, triton.next_power_of_2(width))


@triton.jit(do_not_specialize=["q_scale"])
def _solve_kernel(
    p_q, p_k, p_log_decay, p_beta, p_inverse, p_attention, p_sums, p_rstd_q, p_rstd_k, p_scales, p_decay, p_scratches,
    p_cu_seqlens, p_first_chunk, p_sequences, q_scale, Q_ROW: tl.constexpr, K_ROW: tl.constexpr,
    HK: tl.constexpr, HV: tl.constexpr, DK: tl.constexpr, BK: tl.constexpr, L: tl.constexpr,
    SCRATCH: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head, and the systems of its value heads."""
    i_chunk, i_key = tl.program_id(0), tl.program_id(1)
    i_sequence = tl.load(p_sequences + i_chunk)
    token = tl.load(p_cu_seqlens + i_sequence) + (i_chunk - tl.load(p_first_chunk + i_sequence)) * L
    count = tl.load(p_cu_seqlens + i_sequence + 1) - token
    o_row, o_k = tl.arange(0, L), tl.arange(0, BK)
    valid = o_row < count
    token = token.to(tl.int64)
    row = token + o_row
    b_q = load_rows(p_q + i_key * DK, token, Q_ROW, o_k, DK, count, L)
    b_k = load_rows(p_k + i_key * DK, token, K_ROW, o_k, DK, count, L)
    b_products = dot(b_k, tl.trans(b_k))
    b_reads = dot(b_q, tl.trans(b_k))
    squares_q, squares_k = b_q.to(tl.float32), b_k.to(tl.float32)
    rstd_q = tl.rsqrt(tl.sum(squares_q * squares_q, axis=1) + 1e-6) * q_scale
    rstd_k = tl.rsqrt(tl.sum(squares_k * squares_k, axis=1) + 1e-6)
    tl.store(p_rstd_q + row * HK + i_key, rstd_q, valid)
    tl.store(p_rstd_k + row * HK + i_key, rstd_k, valid)
    b_products *= rstd_k[:, None] * rstd_k[None, :]
    b_reads *= rstd_q[:, None] * rstd_k[None, :]
    for i_head in range(i_key * (HV // HK), (i_key + 1) * (HV // HK)):
        log_decay = tl.load(p_log_decay + row * HV + i_head, valid, other=0.0)
        beta = tl.load(p_beta + row * HV + i_head, valid, other=0.0).to(tl.float32)
        sums = tl.cumsum(log_decay.to(tl.float64), axis=0)
        tl.store(p_sums + row * HV + i_head, sums, valid)
        survived, last = tl.exp(sums.to(tl.float32)), tl.sum(tl.where(o_row == L - 1, sums, 0.0))
        left = tl.exp((last - sums).to(tl.float32))
        p_scale = p_scales + (i_chunk.to(tl.int64) * HV + i_head) * (4 * L) + o_row
        tl.store(p_decay + i_chunk.to(tl.int64) * HV + i_head, tl.exp(last.to(tl.float32)))
        tl.store(p_scale, beta)
        tl.store(p_scale + L, tl.where(valid, survived * rstd_k, 0.0))
        tl.store(p_scale + 2 * L, tl.where(valid, left * rstd_k, 0.0))
        tl.store(p_scale + 3 * L, tl.where(valid, survived * rstd_q, 0.0))
        # Sums reach -1000s: as two fp32 numbers each, their differences keep the precision of the single terms.
        high = sums.to(tl.float32)
        low = (sums - high.to(tl.float64)).to(tl.float32)
        differences = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        ratios = tl.exp(tl.where(o_row[:, None] >= o_row[None, :], differences, float("-inf")))
        o_system = (i_chunk.to(tl.int64) * HV + i_head) * (L * L) + o_row[:, None] * L + o_row[None, :]
        tl.store(p_attention + o_system, (ratios * b_reads).to(p_attention.dtype.element_ty))
        below = o_row[:, None] > o_row[None, :]
        b_system = tl.where(below, beta[:, None] * ratios * b_products, 0.0)
        # The place of the result is large enough for the blocks, in fp32, while they are solved.
        p_scratch = p_scratches + (i_chunk.to(tl.int64) * HV + i_head) * SCRATCH
        b_inverse = _unit_lower_inverse(b_system, p_scratch, L, FACTOR)
        tl.debug_barrier()
        tl.store(p_inverse + o_system, b_inverse.to(p_inverse.dtype.element_ty))


@triton.jit
def _unit_lower_inverse(b_system, p_scratch, L: tl.constexpr, FACTOR: tl.constexpr):
    """(I + system)^-1 of a strictly lower triangular matrix: blocks of 16 by substitution, then pairs of blocks.

    With D the inverse of the diagonal blocks and C what is below them within a pair, the pair's inverse is D - D C D:
    substitution by blocks, exact after one step for any keys, unlike a series of powers.
    """
    i_line, i_column = tl.arange(0, L)[:, None], tl.arange(0, L)[None, :]
    is_block = i_line // 16 == i_column // 16
    p_block = p_scratch + i_line * 16 + i_column % 16
    tl.store(p_block, b_system, is_block)
    tl.debug_barrier()
    _invert_blocks(p_scratch, p_scratch + 16 * L, L)
    tl.debug_barrier()
    b_inverse = tl.load(p_block + 16 * L, is_block, other=0.0)
    for size in tl.static_range(1, 3):
        is_pair = i_line // (32 * size) == i_column // (32 * size)
        b_below = tl.where(is_pair & (i_line // (16 * size) != i_column // (16 * size)), b_system, 0.0)
        b_solved = b_inverse.to(FACTOR)
        b_inverse -= dot(dot(b_solved, b_below.to(FACTOR)).to(FACTOR), b_solved)
    return b_inverse


@triton.jit
def _invert_blocks(p_blocks, p_inverses, L: tl.constexpr):
    """Blocks of 16, each column of an inverse by one thread: its 16 entries are one register each."""
    o_thread = tl.arange(0, L)
    p_blocks += o_thread // 16 * 256
    p_inverses += o_thread // 16 * 256 + o_thread % 16
    rest = ()
    for line in tl.static_range(16):
        rest = rest + (tl.where(o_thread % 16 == line, 1.0, 0.0),)  # noqa: RUF005  (Triton unpacks no tuples)
    for column in tl.static_range(16):
        solved = rest[0]
        tl.store(p_inverses + column * 16, solved)
        updated = ()
        for line in tl.static_range(column + 1, 16):
            entry = rest[line - column] - tl.load(p_blocks + line * 16 + column) * solved
            updated = updated + (entry,)  # noqa: RUF005
        rest = updated

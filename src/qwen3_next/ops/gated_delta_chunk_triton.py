"""The chunked gated delta rule on the GPU: a kernel that solves all chunks at once, and one that walks over them.

docs/gated_delta_rule.md, in its names. Nothing is normalised in memory: 1 / sqrt(|x|^2 + 1e-6) of q and k are scales of
rows of the products. Shapes: G chunks of at most 64 tokens, `L` = 64; rows beyond a chunk's tokens are zero.

There are two pairs of kernels: one for any widths, dtypes and cards, and one for the published model's on Hopper.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false
# (the four: launches, rounded sizes and loops of kernels, which Triton types as constants or not at all)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops import gated_delta_solve_hopper_triton as solve_hopper
from qwen3_next.ops import gated_delta_walk_hopper_triton as walk_hopper
from qwen3_next.ops.common_triton import dot, is_hopper
from qwen3_next.ops.gated_delta_scan_triton import load_rows, walk_kernel
from qwen3_next.ops.gated_delta_walk_hopper_triton import as_tiles
from qwen3_next.ops.segments import Segments
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
    if chunks.count and _is_for_hopper(q, k, width):
        solve_hopper.solve_kernel[(chunks.count * value_heads,)](
            *(_by_chunk(q), _by_chunk(k), *(_squares(x) for x in matrices)),
            *(log_decay, beta, sums, *rstd, scales, decay),
            *(chunks.cu_seqlens, chunks.first, chunks.sequences, width**-0.5),
            HK=key_heads, HV=value_heads, DK=width, L=CHUNK, num_warps=4, maxnreg=128,
        )  # fmt: skip
    elif chunks.count:
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
    if segments.total == 0:
        final_state = v.new_zeros(shape, dtype=torch.float32)
        return ScanResult(v.new_empty(v.shape), final_state if initial_state is None else final_state + initial_state)
    final_state = v.new_empty(shape, dtype=torch.float32)
    initial_state = None if initial_state is None else initial_state.contiguous()
    output = walk(q, k, v, systems, Course(segments, initial_state, final_state, None, None, None))
    return ScanResult(output, final_state)


class Course(NamedTuple):
    """The way of a walk, and where it finds and leaves states.

    Attributes:
        parts: what the sequences consist of; chunks start anew in each part.
        initial: the states that enter sequences, by sequence or by slot; None means zeros.
        final: where the states after parts go, by part or by target.
        slots: of the sequences, in `initial`.
        targets: of the parts, in `final`.
        first: the parts `first[n]:first[n+1]` are those of sequence n; None: each sequence is one part.
    """

    parts: Segments
    initial: Float[Tensor, "M Hv Dk Dv"] | None
    final: Float[Tensor, "M Hv Dk Dv"]
    slots: Int[Tensor, "N"] | None
    targets: Int[Tensor, "P"] | None
    first: Int[Tensor, "N+1"] | None

    @classmethod
    def through_slots(cls, segments: Segments, states: Tensor, slots: Tensor, snapshots: Snapshots | None) -> "Course":
        """From the slots of sequences into these; with a part that ends at each snapshot, into its slot."""
        if snapshots is None:
            return cls(segments, states, states, slots, slots, None)
        stretches = snapshots.cut(segments)
        targets = torch.cat([slots.to(snapshots.slots.dtype), snapshots.slots])[stretches.owners]
        return cls(stretches.segments, states, states, slots, targets, stretches.first)


def walk(q: Tensor, k: Tensor, v: Tensor, systems: ChunkSystems, course: Course) -> Float[Tensor, "T Hv Dv"]:
    """The output of every token; states go where `course` says. `systems` are those of its parts."""
    q, k, v = by_token(q), by_token(k), by_token(v)
    output = v.new_empty(v.shape)
    (_, key_heads, dk), (_, value_heads, dv) = k.shape, v.shape
    sequences = (course.parts.count + 1 if course.first is None else course.first.shape[0]) - 1
    if course.parts.total == 0 or sequences == 0:
        return output
    chunks = course.parts.cut(CHUNK)
    states = (course.initial, course.final, course.slots, course.targets, chunks.cu_seqlens, chunks.first, course.first)
    strides = (0 if course.initial is None else course.initial.stride(0), course.final.stride(0))
    shape = {"HK": key_heads, "HV": value_heads, "DK": dk, "DV": dv, "L": CHUNK}
    if _is_for_hopper(q, k, dk) and _is_for_hopper(v, v, dk) and dv % _HOPPER_COLUMNS == 0:
        walk_hopper.walk_kernel[(dv // _HOPPER_COLUMNS, value_heads, sequences)](
            *(_by_chunk(q), _by_chunk(k), _by_chunk(v, _HOPPER_COLUMNS)),
            *(_squares(systems.inverse), _squares(systems.attention)),
            *(as_tiles(systems.scales.view(-1), [4 * CHUNK]), as_tiles(systems.decay.view(-1), [32])),
            *(_by_chunk(output, _HOPPER_COLUMNS), output, *states, *strides),
            BV=_HOPPER_COLUMNS, STAGES=3, num_warps=4, **shape,
        )  # fmt: skip
        return output
    block, warps, stages = _configuration(dk, dv, v.dtype)
    walk_kernel[(triton.cdiv(dv, block), value_heads, sequences)](
        *(q, k, v, systems.inverse, systems.attention, systems.scales, systems.decay, output, *states, *strides),
        Q_ROW=q.stride(0), K_ROW=k.stride(0), V_ROW=v.stride(0), BK=padded_width(dk), BV=block,
        num_warps=warps, num_stages=stages, **shape,
    )  # fmt: skip
    return output


_HOPPER_COLUMNS = 64
"""Columns of the state in a program: what one group of warps multiplies in one instruction."""


def _is_for_hopper(x: Tensor, y: Tensor, width: int) -> bool:
    """Whether keys of this width are what the kernels for Hopper take, and tiles of x and y can be copied whole."""
    aligned = all(z.data_ptr() % 16 == 0 and z.stride(0) % 8 == 0 for z in (x, y))
    return width in (64, 128) and x.element_size() == 2 and aligned and is_hopper(x.device)


def _by_chunk(x: Float[Tensor, "T H D"], columns: int | None = None) -> object:
    """A descriptor of the tokens of a chunk in one head, or in some columns of one."""
    rows = x.as_strided((x.shape[0], x.shape[1] * x.shape[2]), (x.stride(0), 1))
    return as_tiles(rows, [CHUNK, columns or x.shape[2]])


def _squares(x: Float[Tensor, "G Hv L L"]) -> object:
    return as_tiles(x.view(-1, CHUNK), [CHUNK, CHUNK])


def _configuration(dk: int, dv: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Columns of the state in a program of the walk for any widths, warps, stages of its loads."""
    if dtype == torch.float32:
        return 16, 8, 1
    return min(32, padded_width(dv)), 8 if dk > 128 else 4, 2


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

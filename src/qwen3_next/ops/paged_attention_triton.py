"""Attention over pages on the GPU: a few new tokens per sequence here, long chunks in `paged_chunk_triton.py`.

A few tokens are bound by reading keys and values once. The pages of all sequences, laid end to end, are cut into one
equal share per program, wherever sequences begin and end: one sequence of a million tokens keeps the card as busy as
hundreds of short ones, and nothing but the device has to know how long they are. What a program finds of one sequence
is a piece: the largest score, the sum and the weighted values of each query. A second kernel joins the pieces.
"""
# pyright: basic

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.common_triton import INTERPRETED, dot, multiprocessors
from qwen3_next.ops.paged_chunk_cudnn import attend_round_chunk, is_round, takes_round_chunks
from qwen3_next.ops.paged_chunk_triton import attend_chunks_
from qwen3_next.ops.pages import KeyPages
from qwen3_next.ops.segments import Segments

FEW = 8
"""The most new tokens of a sequence that count as a few."""

TILE = {"BLOCK": 64, "num_warps": 8, "num_stages": 3}
HIGH_TILE = {"BLOCK": 32, "num_warps": 4, "num_stages": 3}
"""Keys that are taken at once, with up to 32 rows (new tokens times the heads of a group) and with 64. For H100 and
H200, one program of heads of 256 on each multiprocessor."""

JOINED = 4_096
"""Elements of the pieces that a program of the second kernel takes at once."""


def _refusal(q: Tensor, pages: KeyPages, segments: Segments, gate: Tensor | None = None) -> str | None:
    if not q.dtype == pages.keys.dtype == pages.values.dtype:
        return "queries, keys and values of different dtypes"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{q.dtype} is not computed on the GPU"
    if pages.page < 16 or pages.page & (pages.page - 1):
        return f"pages of {pages.page} tokens; 16, 32, 64, ... are taken"
    if q.shape[-1] > 256:
        return "heads wider than 256"
    if q.shape[-1] < 16:
        return "heads narrower than 16"
    is_aligned = all(_rows_are_aligned(x) for x in (pages.keys, pages.values))
    return None if is_aligned else "pages whose rows have gaps or begin where no multiple of 16 bytes is"


def _rows_are_aligned(x: Tensor) -> bool:
    starts = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1]))
    return x.stride(-1) == 1 and all(start % 16 == 0 for start in starts)


@refuses(_refusal)
@torch.no_grad()
def paged_attention(
    q: Float[Tensor, "T H Dh"],
    pages: KeyPages,
    segments: Segments,
    gate: Float[Tensor, "T H Dh"] | None = None,
) -> Float[Tensor, "T H Dh"]:
    """The twin of `ops.paged_attention.paged_attention`."""
    q = q if q.stride(-1) == 1 else q.contiguous()
    if gate is not None and gate.stride(-1) != 1:
        gate = gate.contiguous()
    output = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0:
        return output
    most = _most_of_few(q, q.shape[1] // pages.keys.shape[2])
    few = max((length for length in segments.lengths if length <= most), default=0)
    if few:
        _attend_few_(output, q, pages, segments, gate, most, few)
    if segments.max_length > most:
        _attend_many_(output, q, pages, segments, gate, most)
    return output


def _most_of_few(q: Tensor, group: int) -> int:
    """How many new tokens of a sequence are a few: their rows, one for each head of a group, must fit one product.

    In fp32 they are fewer, since products of three parts with 64 rows are suspected of a fault on the card.
    """
    return min(FEW, (32 if q.dtype == torch.float32 else 64) // group)


def _attend_many_(
    output: Tensor, q: Tensor, pages: KeyPages, segments: Segments, gate: Tensor | None, most: int
) -> None:
    """Fill the rows of all sequences with more than a few new tokens."""
    lengths = pages.known_lengths if takes_round_chunks(q, pages) else None
    by_cudnn = [lengths is not None and is_round(new, lengths[n]) for n, new in enumerate(segments.lengths)]
    if any(new > most and not taken for new, taken in zip(segments.lengths, by_cudnn, strict=True)):
        attend_chunks_(output, q, pages, segments, gate, most, any(by_cudnn))
    for n in (n for n, taken in enumerate(by_cudnn) if taken):
        rows = slice(segments.starts[n], segments.starts[n] + segments.lengths[n])
        result = attend_round_chunk(q[rows], pages, n)
        torch.mul(result, 1.0 if gate is None else gate[rows].sigmoid(), out=output[rows])


def _attend_few_(
    output: Tensor, q: Tensor, pages: KeyPages, segments: Segments, gate: Tensor | None, most: int, few: int
) -> None:
    """Fill the rows of all sequences with at most `most` new tokens; `few` is the largest number among them."""
    count, heads, width = segments.count, pages.keys.shape[2], q.shape[-1]
    group = q.shape[1] // heads
    columns, padded_rows = triton.next_power_of_2(width), max(16, triton.next_power_of_2(few * group))
    shares = multiprocessors(q.device) * max(1, 256 // columns) // heads
    shares = max(1, min(shares, count * pages.table.shape[1]))
    rows = few * group
    sums = torch.empty(shares + count, heads, rows, width, dtype=torch.float32, device=q.device)
    stats = torch.empty(shares + count, heads, rows, 2, dtype=torch.float32, device=q.device)
    length = segments.max_length if segments.is_uniform else -1
    common = {"PAGE": pages.page, "LENGTH": length, "FEW": most, "COUNT": triton.next_power_of_2(count)}
    common |= {"QUERIES": few, "GROUP": group, "WIDTH": width}
    where = pages.lengths, segments.cu_seqlens, pages.lengths.stride(0), count, shares
    _pieces_kernel[(shares * heads,)](
        q, pages.keys, pages.values, pages.table, sums, stats, *where,
        *q.stride()[:2], *pages.keys.stride()[:3], *pages.values.stride()[:3], pages.table.stride(0),
        width**-0.5 * 1.4426950408889634,
        HEADS=heads, ROWS=padded_rows, COLUMNS=columns, **common, **_tile_of(q, pages, padded_rows),
    )  # fmt: skip
    part = min(columns, 32 if count * few <= 4 else 256)
    _join_kernel[(count * few, q.shape[1], columns // part)](
        sums, stats, gate, output, *where, *(gate.stride()[:2] if gate is not None else (0, 0)),
        HEADS=heads, COLUMNS=part, PIECES=JOINED // part, **common, num_warps=4, launch_pdl=True,
    )  # fmt: skip


def _tile_of(q: Tensor, pages: KeyPages, rows: int) -> dict[str, int]:
    tile = TILE if rows < 64 else HIGH_TILE
    block = 16 if q.dtype == torch.float32 else tile["BLOCK"]
    return tile | {"BLOCK": min(block, pages.page)}


@triton.jit
def _pages_of(
    p_lengths, p_cu_seqlens, lengths_stride, count,
    PAGE: tl.constexpr, LENGTH: tl.constexpr, FEW: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The pages of every sequence, none of those that are not for this kernel."""
    o_sequence = tl.arange(0, COUNT)
    exists = o_sequence < count
    if LENGTH == -1:
        b_new = tl.load(p_cu_seqlens + o_sequence + 1, exists, other=0)
        b_new -= tl.load(p_cu_seqlens + o_sequence, exists, other=0)
        exists = exists & (b_new > 0) & (b_new <= FEW)
    b_length = tl.load(p_lengths + o_sequence * lengths_stride, exists, other=0)
    return (b_length + PAGE - 1) // PAGE


@triton.jit
def _tokens_of(p_cu_seqlens, i_sequence, LENGTH: tl.constexpr):
    """The first new token of a sequence, and how many it has."""
    if LENGTH == -1:
        start = tl.load(p_cu_seqlens + i_sequence)
        return start, tl.load(p_cu_seqlens + i_sequence + 1) - start
    return i_sequence * LENGTH, LENGTH


@triton.jit(do_not_specialize=["count", "shares", "scale"])
def _pieces_kernel(
    p_q, p_keys, p_values, p_table, p_sums, p_stats, p_lengths, p_cu_seqlens, lengths_stride, count, shares,
    q_stride, q_head_stride, keys_page_stride, keys_stride, keys_head_stride,
    values_page_stride, values_stride, values_head_stride, table_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, LENGTH: tl.constexpr, FEW: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """One share of the pages and one key head; row r is query `r // GROUP` of the group's head `r % GROUP`."""
    if not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()  # the second kernel may start, and wait for the end of this one
    i_share, i_head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    b_pages = _pages_of(p_lengths, p_cu_seqlens, lengths_stride, count, PAGE, LENGTH, FEW, COUNT)
    b_end = tl.cumsum(b_pages, 0)
    total = tl.sum(b_pages, 0)
    share = tl.maximum(1, (total + shares - 1) // shares)
    first = i_share * share
    last = tl.minimum(first + share, total) - 1
    if first > last:
        return
    first_sequence = tl.sum((b_end <= first).to(tl.int32), 0)
    last_sequence = tl.sum((b_end <= last).to(tl.int32), 0)
    before = tl.sum(tl.where(b_end <= first, b_pages, 0), 0)  # the pages of earlier sequences
    PARTS: tl.constexpr = PAGE // BLOCK
    o_row, o_column, o_key = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    in_width = o_column < WIDTH
    for i_sequence in range(first_sequence, last_sequence + 1):
        start, new = _tokens_of(p_cu_seqlens, i_sequence, LENGTH)
        length = tl.load(p_lengths + i_sequence * lengths_stride)
        pages = (length + PAGE - 1) // PAGE
        if LENGTH == -1:
            pages = tl.where((new > 0) & (new <= FEW), pages, 0)
        o_token = o_row // GROUP
        is_row = o_token < tl.minimum(new, QUERIES)
        p_pages = p_table + i_sequence * table_stride
        low, high = tl.maximum(first - before, 0), tl.minimum(last + 1 - before, pages)
        next_page = tl.load(p_pages + low, low < high, other=0)  # known a block ahead, so that loads need not wait
        p_row = p_q + (start + o_token).to(tl.int64) * q_stride + (i_head * GROUP + o_row % GROUP) * q_head_stride
        b_q = tl.load(p_row[:, None] + o_column[None, :], is_row[:, None] & in_width[None, :], other=0.0)
        b_seen = tl.where(is_row, length - new + o_token + 1, 0)  # keys that a query may look at
        b_max = tl.full([ROWS], float("-inf"), tl.float32)
        b_sum = tl.zeros([ROWS], tl.float32)
        b_output = tl.zeros([ROWS, COLUMNS], tl.float32)
        for i in range(low * PARTS, high * PARTS):
            page = next_page.to(tl.int64)
            next_page = tl.load(p_pages + tl.minimum((i + 1) // PARTS, high - 1))
            o_place = i % PARTS * BLOCK + o_key
            exists = i * BLOCK + o_key < length
            is_entry = exists[:, None] & in_width[None, :]  # what lies behind the last key may be anything
            p_key = p_keys + page * keys_page_stride + i_head * keys_head_stride
            b_k = tl.load(p_key + o_place[:, None] * keys_stride + o_column[None, :], is_entry, other=0.0)
            p_value = p_values + page * values_page_stride + i_head * values_head_stride
            b_v = tl.load(p_value + o_place[:, None] * values_stride + o_column[None, :], is_entry, other=0.0)
            b_score = dot(b_q, tl.trans(b_k)) * scale
            b_score = tl.where(i * BLOCK + o_key[None, :] < b_seen[:, None], b_score, float("-inf"))
            b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
            b_safe_max = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
            b_rest = tl.exp2(b_max - b_safe_max)
            b_weight = tl.exp2(b_score - b_safe_max[:, None])
            b_sum = b_sum * b_rest + tl.sum(b_weight, 1)
            b_output = dot(b_weight.to(b_v.dtype), b_v, b_output * b_rest[:, None])
            b_max = b_new_max
        before += pages
        o_entry = ((i_share + i_sequence) * HEADS + i_head) * (QUERIES * GROUP) + o_row
        tl.store(p_stats + o_entry * 2, b_max, is_row)
        tl.store(p_stats + o_entry * 2 + 1, b_sum, is_row)
        p_entry = p_sums + o_entry.to(tl.int64)[:, None] * WIDTH + o_column[None, :]
        tl.store(p_entry, b_output, is_row[:, None] & in_width[None, :])


@triton.jit(do_not_specialize=["count", "shares"])
def _join_kernel(
    p_sums, p_stats, p_gate, p_output, p_lengths, p_cu_seqlens, lengths_stride, count, shares,
    gate_stride, gate_head_stride,
    HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
    PIECES: tl.constexpr, PAGE: tl.constexpr, LENGTH: tl.constexpr, FEW: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The pieces of one query and one head, and the gate; piece `i_share + i_sequence` is what a share found."""
    i_sequence, i_token = tl.program_id(0) // QUERIES, tl.program_id(0) % QUERIES
    i_head = tl.program_id(1)
    start, new = _tokens_of(p_cu_seqlens, i_sequence, LENGTH)
    if (i_token >= new) | (new > FEW):
        return
    b_pages = _pages_of(p_lengths, p_cu_seqlens, lengths_stride, count, PAGE, LENGTH, FEW, COUNT)
    o_sequence = tl.arange(0, COUNT)
    before = tl.sum(tl.where(o_sequence < i_sequence, b_pages, 0), 0)
    pages = tl.sum(tl.where(o_sequence == i_sequence, b_pages, 0), 0)
    share = tl.maximum(1, (tl.sum(b_pages, 0) + shares - 1) // shares)
    first = before // share + i_sequence
    end = tl.where(pages > 0, (before + pages - 1) // share + i_sequence + 1, first)
    o_column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    in_width = o_column < WIDTH
    i_row = (start + i_token).to(tl.int64)
    b_factor = 1.0
    if p_gate is not None:
        p_gates = p_gate + i_row * gate_stride + i_head * gate_head_stride
        b_factor = 1.0 / (1.0 + tl.exp(-tl.load(p_gates + o_column, in_width, other=0.0).to(tl.float32)))
    if not INTERPRETED:
        tl.extra.cuda.gdc_wait()  # from here on the pieces are there
    b_max = tl.full([1], float("-inf"), tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    b_output = tl.zeros([COLUMNS], tl.float32)
    for i in range(first, end, PIECES):
        o_piece = i + tl.arange(0, PIECES)
        exists = o_piece < end
        o_entry = (o_piece * HEADS + i_head // GROUP) * (QUERIES * GROUP) + i_token * GROUP + i_head % GROUP
        b_piece_max = tl.load(p_stats + o_entry * 2, exists, other=float("-inf"))
        b_piece_sum = tl.load(p_stats + o_entry * 2 + 1, exists, other=0.0)
        p_entry = p_sums + o_entry.to(tl.int64)[:, None] * WIDTH + o_column[None, :]
        b_piece = tl.load(p_entry, exists[:, None] & in_width[None, :], other=0.0)
        b_new_max = tl.maximum(b_max, tl.max(b_piece_max, 0))
        b_safe_max = tl.where(b_new_max == float("-inf"), 0.0, b_new_max)
        b_rest = tl.exp2(b_max - b_safe_max)
        b_weight = tl.exp2(b_piece_max - b_safe_max)
        b_sum = b_sum * b_rest + tl.sum(b_piece_sum * b_weight, 0)
        b_output = b_output * b_rest + tl.sum(b_piece * b_weight[:, None], 0)
        b_max = b_new_max
    b_output = b_output / tl.where(b_sum > 0, b_sum, 1.0) * b_factor
    p_out = p_output + (i_row * (HEADS * GROUP) + i_head) * WIDTH + o_column
    tl.store(p_out, b_output.to(p_output.dtype.element_ty), in_width)

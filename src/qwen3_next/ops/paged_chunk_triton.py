"""Attention of long chunks of new tokens over pages: what a prompt needs that goes on from a cache."""
# pyright: basic

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.paged_chunk_cudnn import ROUND, WORTH
from qwen3_next.ops.pages import KeyPages
from qwen3_next.ops.segments import Segments

TILE = {"ROWS": 128, "BLOCK": 64, "num_warps": 8, "num_stages": 2}
"""Query rows of a program (tokens times the heads of a group), and keys taken at once. For H100 and H200."""


def attend_chunks_(
    output: Tensor, q: Tensor, pages: KeyPages, segments: Segments, gate: Tensor | None, few: int, is_for_rest: bool
) -> None:
    """Fill the rows of all sequences with more than `few` new tokens, but of those that cuDNN takes if it has some."""
    heads, width = pages.keys.shape[2], q.shape[-1]
    group = q.shape[1] // heads
    tile = _tile_of(q, pages, group)
    tokens = tile["ROWS"] // group
    parts = segments.cut(tokens)
    block = [1, tile["BLOCK"], 1, triton.next_power_of_2(width)]
    whole = [TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in (pages.keys, pages.values)]
    _chunk_kernel[(parts.count * heads,)](
        q, pages.keys, pages.values, *whole, pages.table, pages.lengths, gate, output,
        parts.cu_seqlens, parts.first, parts.sequences, parts.count,
        *q.stride()[:2], *pages.keys.stride()[:3], *pages.values.stride()[:3], pages.table.stride(0),
        pages.lengths.stride(0), *(gate.stride()[:2] if gate is not None else (0, 0)),
        width**-0.5 * 1.4426950408889634,
        HEADS=heads, GROUP=group, TOKENS=tokens, WIDTH=width, COLUMNS=triton.next_power_of_2(width),
        PAGE=pages.page, FEW=few, ROUND=ROUND if is_for_rest else 0, WORTH=WORTH, **tile,
    )  # fmt: skip


def _tile_of(q: Tensor, pages: KeyPages, group: int) -> dict[str, int]:
    tile = dict(TILE)
    if q.dtype == torch.float32:
        tile |= {"ROWS": 32, "BLOCK": 16, "num_warps": 4}
    rows = max(tile["ROWS"], triton.next_power_of_2(group))
    return tile | {"ROWS": rows, "BLOCK": min(tile["BLOCK"], pages.page)}


@triton.jit(do_not_specialize=["count", "scale"])
def _chunk_kernel(
    p_q, p_keys, p_values, d_keys, d_values, p_table, p_lengths, p_gate, p_output,
    p_cu_seqlens, p_first, p_sequences, count,
    q_stride, q_head_stride, keys_page_stride, keys_stride, keys_head_stride,
    values_page_stride, values_stride, values_head_stride, table_stride, lengths_stride,
    gate_stride, gate_head_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, FEW: tl.constexpr, ROUND: tl.constexpr,
    WORTH: tl.constexpr,
):  # fmt: skip
    """TOKENS new tokens of one sequence and one key head; row r is token `r // GROUP`, head `r % GROUP`."""
    i_part, i_head = count - 1 - tl.program_id(0) // HEADS, tl.program_id(0) % HEADS  # those that see most first
    i_sequence = tl.load(p_sequences + i_part)
    start = tl.load(p_cu_seqlens + i_sequence)
    new = tl.load(p_cu_seqlens + i_sequence + 1) - start
    if new <= FEW:
        return
    length = tl.load(p_lengths + i_sequence * lengths_stride)
    if ROUND > 0:  # noqa: SIM102 - the inner condition is not compiled without
        if (new % ROUND == 0) & (new.to(tl.int64) * length >= WORTH):
            return
    first = (i_part - tl.load(p_first + i_sequence)) * TOKENS
    o_row, o_column, o_key = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK)
    is_column = (o_column < WIDTH)[None, :]
    o_token = first + o_row // GROUP
    is_row = (o_row < TOKENS * GROUP) & (o_token < new)
    is_entry = is_row[:, None] & is_column
    o_head = i_head * GROUP + o_row % GROUP
    o_line = (start + o_token).to(tl.int64)
    p_row = p_q + o_line * q_stride + o_head * q_head_stride
    b_q = tl.load(p_row[:, None] + o_column[None, :], is_entry, other=0.0)
    seen = length - new + first  # keys before the first token of this program
    b_seen = seen + 1 + o_row // GROUP
    whole = tl.maximum(seen + 1, 0) // BLOCK  # blocks that every query sees all of
    blocks = tl.cdiv(tl.maximum(tl.minimum(seen + TOKENS, length), 0), BLOCK)
    b_max = tl.full([ROWS], float("-inf"), tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_output = tl.zeros([ROWS, COLUMNS], tl.float32)
    p_pages = p_table + i_sequence.to(tl.int64) * table_stride
    p_keys += i_head * keys_head_stride
    p_values += i_head * values_head_stride
    PARTS: tl.constexpr = PAGE // BLOCK
    page = tl.load(p_pages, blocks > 0, other=0)  # known a block ahead, so that loads need not wait
    for i in range(whole):
        b_k = d_keys.load([page, i * BLOCK % PAGE, i_head, 0]).reshape(BLOCK, COLUMNS)
        b_v = d_values.load([page, i * BLOCK % PAGE, i_head, 0]).reshape(BLOCK, COLUMNS)
        page = tl.load(p_pages + tl.minimum(i + 1, blocks - 1) // PARTS)
        b_max, b_sum, b_output = _attend(b_q, b_k, b_v, b_max, b_sum, b_output, scale, b_seen, i * BLOCK, False)
    for i in range(whole, blocks):
        place = page.to(tl.int64) * keys_page_stride + i * BLOCK % PAGE * keys_stride
        exists = is_column & (i * BLOCK + o_key < length)[:, None]  # what lies behind the last key may be anything
        b_k = tl.load(p_keys + place + o_key[:, None] * keys_stride + o_column[None, :], exists, other=0.0)
        place = page.to(tl.int64) * values_page_stride + i * BLOCK % PAGE * values_stride
        b_v = tl.load(p_values + place + o_key[:, None] * values_stride + o_column[None, :], exists, other=0.0)
        page = tl.load(p_pages + tl.minimum(i + 1, blocks - 1) // PARTS)
        b_max, b_sum, b_output = _attend(b_q, b_k, b_v, b_max, b_sum, b_output, scale, b_seen, i * BLOCK, True)
    b_output = b_output / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    if p_gate is not None:
        p_gates = p_gate + o_line * gate_stride + o_head * gate_head_stride
        b_gate = tl.load(p_gates[:, None] + o_column[None, :], is_entry, other=0.0).to(tl.float32)
        b_output = b_output / (1.0 + tl.exp(-b_gate))
    p_out = p_output + (o_line * (HEADS * GROUP) + o_head)[:, None] * WIDTH + o_column[None, :]
    tl.store(p_out, b_output.to(p_output.dtype.element_ty), is_entry)


@triton.jit
def _attend(b_q, b_k, b_v, b_max, b_sum, b_output, scale, b_seen, first, MASKED: tl.constexpr):
    """One step of the running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867), in powers of two."""
    b_score = dot(b_q, tl.trans(b_k)) * scale
    if MASKED:
        o_key = first + tl.arange(0, b_k.shape[0])
        b_score = tl.where(o_key[None, :] < b_seen[:, None], b_score, float("-inf"))
    b_new_max = tl.maximum(b_max, tl.max(b_score, 1))
    b_safe_max = tl.where(b_new_max == float("-inf"), 0.0, b_new_max) if MASKED else b_new_max
    b_rest = tl.exp2(b_max - b_safe_max)
    b_weight = tl.exp2(b_score - b_safe_max[:, None])
    b_sum = b_sum * b_rest + tl.sum(b_weight, 1)
    return b_new_max, b_sum, dot(b_weight.to(b_v.dtype), b_v, b_output * b_rest[:, None])

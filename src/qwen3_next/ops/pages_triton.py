"""Writing keys and values into pages on the GPU."""
# pyright: basic

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.pages import KeyPages
from qwen3_next.ops.segments import Segments

TOKENS = 16
"""Of a program, where sequences bring more than a few."""


def _refusal(k: Tensor, v: Tensor, pages: KeyPages, segments: Segments) -> str | None:
    if torch.float64 in (k.dtype, v.dtype, pages.keys.dtype, pages.values.dtype):
        return "fp64 is not computed on the GPU"
    return None if pages.keys.stride(-1) == pages.values.stride(-1) == 1 else "the rows of pages have gaps"


@refuses(_refusal)
@torch.no_grad()
def write_pages_(
    k: Float[Tensor, "T Hkv Dh"], v: Float[Tensor, "T Hkv Dh"], pages: KeyPages, segments: Segments
) -> None:
    """The twin of `ops.pages.write_pages_`."""
    if k.numel() == 0:
        return
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    tokens = min(TOKENS, triton.next_power_of_2(segments.max_length))
    if segments.is_uniform:  # as in decoding: nothing has to be computed from the borders
        per_sequence = triton.cdiv(segments.max_length, tokens)
        programs, first, sequences = segments.count * per_sequence, None, None
    else:
        parts = segments.cut(tokens)
        per_sequence, programs, first, sequences = 0, parts.count, parts.first, parts.sequences
    heads, width = k.shape[1:]
    _write_kernel[(programs,)](
        k, v, pages.keys, pages.values, pages.table, pages.lengths, segments.cu_seqlens, first, sequences,
        per_sequence, *k.stride()[:2], *v.stride()[:2], *pages.keys.stride()[:3], *pages.values.stride()[:3],
        pages.table.stride(0), pages.lengths.stride(0), HEADS=heads, WIDTH=width, PAGE=pages.page, TOKENS=tokens,
        BLOCK=triton.next_power_of_2(heads * width),
    )  # fmt: skip


@triton.jit(do_not_specialize=["per_sequence"])
def _write_kernel(
    p_k, p_v, p_keys, p_values, p_table, p_lengths, p_cu_seqlens, p_first, p_sequences,
    per_sequence, k_stride, k_head_stride, v_stride, v_head_stride,
    keys_page_stride, keys_stride, keys_head_stride, values_page_stride, values_stride, values_head_stride,
    table_stride, lengths_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if p_first is None:
        i_sequence, i_part = tl.program_id(0) // per_sequence, tl.program_id(0) % per_sequence
    else:
        i_sequence = tl.load(p_sequences + tl.program_id(0))
        i_part = tl.program_id(0) - tl.load(p_first + i_sequence)
    start, end = tl.load(p_cu_seqlens + i_sequence), tl.load(p_cu_seqlens + i_sequence + 1)
    before = tl.load(p_lengths + i_sequence * lengths_stride) - (end - start)
    o_token = i_part * TOKENS + tl.arange(0, TOKENS)
    position = before + o_token
    is_token = (o_token < end - start) & (position >= 0)
    page = tl.load(p_table + i_sequence.to(tl.int64) * table_stride + position // PAGE, is_token, other=0).to(tl.int64)
    o_entry = tl.arange(0, BLOCK)[None, :]
    o_head, o_inside = o_entry // WIDTH, o_entry % WIDTH
    exists = is_token[:, None] & (o_entry < HEADS * WIDTH)
    o_row = (start + o_token).to(tl.int64)[:, None]
    o_place = (position % PAGE)[:, None]
    b_k = tl.load(p_k + o_row * k_stride + o_head * k_head_stride + o_inside, exists)
    p_key = p_keys + page[:, None] * keys_page_stride + o_place * keys_stride + o_head * keys_head_stride + o_inside
    tl.store(p_key, b_k.to(p_keys.dtype.element_ty), exists)
    b_v = tl.load(p_v + o_row * v_stride + o_head * v_head_stride + o_inside, exists)
    p_value = p_values + page[:, None] * values_page_stride + o_place * values_stride + o_head * values_head_stride
    tl.store(p_value + o_inside, b_v.to(p_values.dtype.element_ty), exists)

"""What the kernels of the causal convolution share: where channels stand, and windows of four inputs.

Fewer than four taps are four whose oldest are zero.
"""
# pyright: basic, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# (the two: tuples that unrolled loops of kernels fill)

import triton
import triton.language as tl
from torch import Tensor

from qwen3_next.ops.causal_conv import ProjectionColumns


def rows_of(x: Tensor) -> Tensor:
    """x, or a copy, whose columns lie one after the other; rows may be further apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def layout_of(channels: int, columns: ProjectionColumns | None, block: int) -> dict[str, int]:
    """The constants of `place`; HEADS = 0 says that a row holds just the channels."""
    block = min(block, triton.next_power_of_2(channels))
    if columns is None:
        return {"CHANNELS": channels, "HEADS": 0, "KEYS": 0, "VALUES": 0, "BLOCK": block}
    heads, keys, values = columns.key_heads, columns.key_width, columns.values
    return {"CHANNELS": channels, "HEADS": heads, "KEYS": keys, "VALUES": values, "BLOCK": block}


def block_count(layout: dict[str, int]) -> int:
    """How many blocks the channels are; none holds channels of two of q, k and v."""
    if layout["HEADS"] == 0:
        return triton.cdiv(layout["CHANNELS"], layout["BLOCK"])
    keys, values = (triton.cdiv(layout["HEADS"] * layout[name], layout["BLOCK"]) for name in ("KEYS", "VALUES"))
    return 2 * keys + values


@triton.jit
def place(
    i_block, CHANNELS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The channels of a block, their columns in a row, which of them exist, and whether they are channels of v."""
    o_inside = tl.arange(0, BLOCK)
    if HEADS == 0:
        o_channel = i_block * BLOCK + o_inside
        o_column, exists, is_value = o_channel, o_channel < CHANNELS, False
    else:
        key_blocks: tl.constexpr = (HEADS * KEYS + BLOCK - 1) // BLOCK
        group: tl.constexpr = 2 * KEYS + 2 * VALUES
        section = tl.minimum(i_block // key_blocks, 2)
        is_value = section == 2
        o_inside += (i_block - section * key_blocks) * BLOCK
        exists = o_inside < tl.where(is_value, HEADS * VALUES, HEADS * KEYS)
        o_key = o_inside // KEYS * group + o_inside % KEYS + section * KEYS
        o_value = o_inside // VALUES * group + o_inside % VALUES + 2 * KEYS
        o_channel = section * (HEADS * KEYS) + o_inside
        o_column = tl.where(is_value, o_value, o_key)
    return o_channel, o_column, exists, is_value


@triton.jit
def load_taps(p_weight, o_channel, exists, TAPS: tl.constexpr):
    """The weights of the inputs 3, 2, 1 and 0 tokens ago, in fp32."""
    taps = ()
    for i in tl.static_range(4):
        taps += (
            tl.load(p_weight + o_channel * TAPS + (i + TAPS - 4), exists & (i + TAPS >= 4), other=0.0).to(tl.float32),
        )
    return taps


@triton.jit
def load_window(p_state, o_channel, exists, TAPS: tl.constexpr, dtype: tl.constexpr):
    """The inputs 3, 2 and 1 tokens ago that a state holds, rounded to the dtype of the inputs, in fp32."""
    window = ()
    for i in tl.static_range(3):
        b_x = tl.load(p_state + o_channel * (TAPS - 1) + (i + TAPS - 4), exists & (i + TAPS >= 4), other=0.0)
        window += (b_x.to(dtype).to(tl.float32),)
    return window


@triton.jit
def weighted(taps, b_3, b_2, b_1, b_0):
    """The sum over the window."""
    return taps[0] * b_3 + taps[1] * b_2 + taps[2] * b_1 + taps[3] * b_0


@triton.jit
def window_before(
    p_x, p_state, p_slots, i_sequence, offset, row_stride, state_stride, o_channel, o_column, exists,
    TAPS: tl.constexpr,
):  # fmt: skip
    """The three inputs before a part: rows of x, or the state where the part is the first of its sequence."""
    rows = ()
    for i in tl.static_range(3):
        b_x = tl.load(p_x - (3 - i) * row_stride + o_column, exists & (offset > 0), other=0.0)
        rows += (b_x.to(tl.float32),)
    if p_state is not None:
        slot = i_sequence if p_slots is None else tl.load(p_slots + i_sequence)
        p_window = p_state + slot.to(tl.int64) * state_stride
        window = load_window(p_window, o_channel, exists & (offset == 0), TAPS, p_x.dtype.element_ty)
        rows = (rows[0] + window[0], rows[1] + window[1], rows[2] + window[2])
    return rows


@triton.jit
def part_of(p_cu_seqlens, p_first, p_sequences, i_part, SIZE: tl.constexpr):
    """The sequence of a part, its first token, how many came before it and how many tokens are left from there."""
    i_sequence = tl.load(p_sequences + i_part)
    start = tl.load(p_cu_seqlens + i_sequence)
    offset = (i_part - tl.load(p_first + i_sequence)) * SIZE
    return i_sequence, (start + offset).to(tl.int64), offset, tl.load(p_cu_seqlens + i_sequence + 1) - start - offset

"""Which rows belong to which expert, found on the GPU without the host ever waiting for it.

A counting sort: blocks of choices rank their own, the counts of the blocks are summed, then every choice knows its
place. The same choices always get the same places.
"""
# pyright: basic

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from jaxtyping import Int
from torch import Tensor

BLOCK = 256
"""Choices that one program ranks among each other."""

_PART = 32
"""Choices that all of a block are compared with at once."""

_COLUMNS = 16
_STEP = 256
"""Experts of a program that sums the counts of blocks, and blocks of one of its steps."""

_TILES = 32
"""Tiles that one program describes."""


@dataclass(frozen=True, eq=False)
class ExpertOrder:
    """The choices of all tokens, sorted by expert; behind them one row per token for the shared expert, where wanted.

    Attributes:
        tokens: `[P]` int32, the token of each sorted row; P = T K. Choices of experts that are not here, whose numbers
            are outside 0..E-1, leave rows without a token at the end, which are in no tile.
        places: `[T, K]` int32, the sorted row of each choice; -1 where its expert is not here.
        borders: `[E+1]` int32, the rows `borders[e]:borders[e+1]` are expert e's.
        tiles: `[3, G]` int32: expert, first row and end of the expert's rows, for each tile of `size` rows. The shared
            expert has the number E. Tiles without rows stand at the end.
        size: rows of a tile.
        rows: how many there are, those of the shared expert included.
    """

    tokens: Int[Tensor, "P"]
    places: Int[Tensor, "T K"]
    borders: Int[Tensor, "E+1"]
    tiles: Int[Tensor, "3 G"]
    size: int
    rows: int

    @classmethod
    def of(cls, experts: Int[Tensor, "T K"], count: int, size: int, shared: bool) -> "ExpertOrder":
        """Sort the choices among `count` experts and cut each expert's rows into tiles of `size`."""
        choices, own = experts.numel(), experts.shape[0] if shared else 0
        blocks = triton.cdiv(choices, BLOCK)
        tiles = min(count, choices) + choices // size + triton.cdiv(own, size)
        integers = {"dtype": torch.int32, "device": experts.device}
        order = cls(
            tokens=torch.empty(choices, **integers),
            places=torch.empty(experts.shape, **integers),
            borders=torch.empty(count + 1, **integers),
            tiles=torch.empty(3, tiles, **integers),
            size=size,
            rows=choices + own,
        )
        experts, sizes = experts.contiguous(), {"BLOCK": BLOCK, "EXPERTS": triton.next_power_of_2(count)}
        counts = totals = None
        if blocks > 1:
            counts, totals = torch.empty(blocks, count, **integers), torch.empty(count, **integers)
            _count_kernel[(blocks,)](experts, counts, choices, count, **sizes)
            grid = (triton.cdiv(count, _COLUMNS),)
            _sum_kernel[grid](counts, totals, blocks, count, COLUMNS=_COLUMNS, STEP=_STEP, num_warps=4)
        _place_kernel[(blocks + triton.cdiv(tiles, _TILES),)](
            *(experts, counts, totals, order.tokens, order.places, order.borders, order.tiles),
            *(choices, count, blocks, tiles, own),
            K=experts.shape[1], SIZE=size, TILES=_TILES, PART=_PART, **sizes, num_warps=8,
        )  # fmt: skip
        return order


@triton.jit
def tile_of(p_tiles, tiles, i_tile):
    """Expert, first row and end of the expert's rows."""
    return tl.load(p_tiles + i_tile), tl.load(p_tiles + tiles + i_tile), tl.load(p_tiles + 2 * tiles + i_tile)


@triton.jit(do_not_specialize=["choices"])
def _count_kernel(p_experts, p_counts, choices, count, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """How many choices of a block fell on each expert."""
    i_block, o_expert = tl.program_id(0), tl.arange(0, EXPERTS)
    b_count = _histogram(p_experts, i_block, choices, count, BLOCK, EXPERTS)
    tl.store(p_counts + i_block * count + o_expert, b_count, o_expert < count)


@triton.jit
def _histogram(p_experts, i_block, choices, count, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    o_choice = i_block * BLOCK + tl.arange(0, BLOCK)
    b_chosen = tl.load(p_experts + o_choice, o_choice < choices, other=-1).to(tl.int32)
    is_here = (b_chosen >= 0) & (b_chosen < count)
    return tl.histogram(tl.where(is_here, b_chosen, 0), EXPERTS, mask=is_here)


@triton.jit(do_not_specialize=["blocks"])
def _sum_kernel(p_counts, p_totals, blocks, count, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Each block's counts become those of the blocks before it; what is left at the end are the totals."""
    o_expert = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    b_before = tl.zeros([COLUMNS], tl.int32)
    for block in range(0, blocks, STEP):
        o_block = block + tl.arange(0, STEP)
        o_count = o_block[:, None] * count + o_expert[None, :]
        mask = (o_block < blocks)[:, None] & (o_expert < count)[None, :]
        b_count = tl.load(p_counts + o_count, mask, other=0)
        b_sum = tl.cumsum(b_count, axis=0)
        tl.store(p_counts + o_count, b_before[None, :] + b_sum - b_count, mask)
        b_before += tl.sum(b_count, axis=0)
    tl.store(p_totals + o_expert, b_before, o_expert < count)


@triton.jit(do_not_specialize=["choices", "blocks", "tiles", "own"])
def _place_kernel(
    p_experts, p_counts, p_totals, p_tokens, p_places, p_borders, p_tiles, choices, count, blocks, tiles, own,
    K: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, PART: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """The first programs place a block of choices each, the others describe tiles. A single block counts here."""
    i_program, o_expert = tl.program_id(0), tl.arange(0, EXPERTS)
    if p_totals is None:
        b_total = _histogram(p_experts, 0, choices, count, BLOCK, EXPERTS)
    else:
        b_total = tl.load(p_totals + o_expert, o_expert < count, other=0)
    if i_program < blocks:
        o_choice = i_program * BLOCK + tl.arange(0, BLOCK)
        is_choice = o_choice < choices
        b_chosen = tl.load(p_experts + o_choice, is_choice, other=-1).to(tl.int32)
        is_here = (b_chosen >= 0) & (b_chosen < count)
        b_chosen = tl.where(is_here, b_chosen, 0)
        b_place = tl.gather(tl.cumsum(b_total) - b_total, b_chosen, axis=0)
        if p_counts is not None:
            b_place += tl.load(p_counts + i_program * count + b_chosen, is_here, other=0)
        b_earlier = tl.zeros([PART, BLOCK], tl.int32)  # of the block, on the same expert
        for part in range(0, BLOCK, PART):
            o_other = i_program * BLOCK + part + tl.arange(0, PART)
            b_other = tl.load(p_experts + o_other, o_other < choices, other=-1).to(tl.int32)
            is_same = b_other[:, None] == b_chosen[None, :]
            b_earlier += (is_same & (o_other[:, None] < o_choice[None, :])).to(tl.int32)
        b_place += tl.sum(b_earlier, axis=0)
        tl.store(p_places + o_choice, tl.where(is_here, b_place, -1), is_choice)
        tl.store(p_tokens + b_place, o_choice // K, is_here)
        if i_program == 0:
            tl.store(p_borders + 1 + o_expert, tl.cumsum(b_total), o_expert < count)
            tl.store(p_borders, 0)
    else:
        o_tile = (i_program - blocks) * TILES + tl.arange(0, TILES)
        b_tiles = (b_total + (SIZE - 1)) // SIZE
        b_end = tl.cumsum(b_tiles)
        is_before = (b_end[:, None] <= o_tile[None, :]) & (o_expert < count)[:, None]
        b_expert = tl.sum(is_before.to(tl.int32), axis=0)
        is_shared = b_expert == count
        o_known = tl.where(is_shared, 0, b_expert)
        first_row = tl.where(is_shared, choices, tl.gather(tl.cumsum(b_total) - b_total, o_known, axis=0))
        first_tile = tl.where(is_shared, tl.sum(b_tiles, axis=0), tl.gather(b_end - b_tiles, o_known, axis=0))
        rows = tl.where(is_shared, own, tl.gather(b_total, o_known, axis=0))
        mask = o_tile < tiles
        tl.store(p_tiles + o_tile, b_expert, mask)
        tl.store(p_tiles + tiles + o_tile, first_row + (o_tile - first_tile) * SIZE, mask)
        tl.store(p_tiles + 2 * tiles + o_tile, first_row + rows, mask)

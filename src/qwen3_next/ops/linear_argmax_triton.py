"""The largest logit of each token on the GPU: the head is read once, for a few tokens as fast as memory gives it."""
# pyright: basic

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.cross_entropy import allowed_ids
from qwen3_next.ops.quant import FP8_BLOCK, block_scale_shape

FEW = {"IDS": 64, "K": 128, "num_warps": 4, "num_stages": 4}
MANY = {"IDS": 128, "K": 64, "num_warps": 8, "num_stages": 3}
FP8 = {"IDS": 64, "K": 128, "num_warps": 4, "num_stages": 4}
SINGLE_PRECISION = {"IDS": 64, "K": 32, "num_warps": 4, "num_stages": 3}
"""Ids of a program and columns of a step of its product: up to 64 tokens, where several programs on a multiprocessor
keep the memory busy, and of 128 tokens; of fp8 a step is one block of scales. For H100 and H200."""


def _refusal(hidden: Tensor, weight: Tensor, scale_inv: Tensor | None = None, limit: int | None = None) -> str | None:
    if hidden.dtype == torch.float64:
        return "fp64 is not computed on the GPU"
    if scale_inv is None:
        return None if weight.dtype == hidden.dtype else "a weight of another dtype"
    fits = weight.dtype == torch.float8_e4m3fn and tuple(scale_inv.shape) == block_scale_shape(tuple(weight.shape))
    return None if fits else "a weight that is no e4m3, or scales of another shape than its blocks ask for"


@refuses(_refusal)
@torch.no_grad()
def linear_argmax(
    hidden: Float[Tensor, "T D"],
    weight: Shaped[Tensor, "V D"],
    scale_inv: Float[Tensor, "VB DB"] | None = None,
    limit: int | None = None,
) -> Int[Tensor, "T"]:
    """The twin of `ops.cross_entropy.linear_argmax`."""
    ids, tokens = allowed_ids(weight, limit), hidden.shape[0]
    chosen = torch.empty(tokens, dtype=torch.int64, device=hidden.device)
    if tokens == 0:
        return chosen
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    block = min(128 if scale_inv is None else 64, max(16, triton.next_power_of_2(tokens)))
    settings = _settings(hidden, scale_inv, block)
    tiles, blocks = triton.cdiv(ids, settings["IDS"]), triton.cdiv(tokens, block)
    values = torch.empty(tiles, tokens, dtype=torch.float32, device=hidden.device)
    winners = torch.empty(tiles, tokens, dtype=torch.int32, device=hidden.device)
    _tile_kernel[(tiles * blocks,)](
        *(hidden, weight, None if scale_inv is None else scale_inv.contiguous(), values, winners),
        *(hidden.stride(0), weight.stride(0), tokens, ids, blocks),
        WIDTH=hidden.shape[1], SCALE=FP8_BLOCK, TOKENS=block, **settings,
    )  # fmt: skip
    _choose_kernel[(tokens,)](
        values, winners, chosen, tokens, tiles, ids, BLOCK=min(4096, triton.next_power_of_2(tiles)), num_warps=8
    )
    return chosen


def _settings(hidden: Tensor, scale_inv: Tensor | None, block: int) -> dict[str, int]:
    if scale_inv is not None:
        return FP8
    if hidden.element_size() > 2:
        return SINGLE_PRECISION
    return FEW if block <= 64 else MANY


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _tile_kernel(
    p_hidden, p_weight, p_scales, p_values, p_winners, hidden_stride, weight_stride, tokens, ids, blocks,
    WIDTH: tl.constexpr, SCALE: tl.constexpr, TOKENS: tl.constexpr, IDS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The largest logit of each token among a tile of ids, and the first id that has it."""
    i_tile, i_block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    o_id, o_token = i_tile * IDS + tl.arange(0, IDS), i_block * TOKENS + tl.arange(0, TOKENS)
    o_k = tl.arange(0, K)
    p_weight += tl.minimum(o_id, ids - 1).to(tl.int64)[:, None] * weight_stride + o_k[None, :]
    p_hidden += o_token.to(tl.int64)[None, :] * hidden_stride + o_k[:, None]
    if p_scales is not None:
        p_scales += (i_tile * IDS // SCALE) * ((WIDTH + SCALE - 1) // SCALE)
    b_logits = tl.zeros([IDS, TOKENS], tl.float32)
    for k in range(0, WIDTH, K):
        if WIDTH % K == 0:
            b_weight = tl.load(p_weight + k)
            b_hidden = tl.load(p_hidden + k, (o_token < tokens)[None, :], other=0.0)
        else:
            b_weight = tl.load(p_weight + k, (o_k < WIDTH - k)[None, :], other=0.0)
            b_hidden = tl.load(p_hidden + k, (o_token < tokens)[None, :] & (o_k < WIDTH - k)[:, None], other=0.0)
        if p_scales is None:
            b_logits = dot(b_weight, b_hidden, b_logits)
        else:
            b_logits += dot(b_weight.to(b_hidden.dtype), b_hidden) * tl.load(p_scales + k // SCALE).to(tl.float32)
    b_logits = tl.where((o_id < ids)[:, None], b_logits, float("-inf"))
    b_largest, b_index = tl.max(b_logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
    o_output = i_tile.to(tl.int64) * tokens + o_token
    tl.store(p_values + o_output, b_largest, o_token < tokens)
    tl.store(p_winners + o_output, i_tile * IDS + b_index, o_token < tokens)


@triton.jit(do_not_specialize=["tokens"])
def _choose_kernel(p_values, p_winners, p_chosen, tokens, tiles, ids, BLOCK: tl.constexpr):
    """The winner of the winners of one token, the smallest id where several are equal."""
    i_token = tl.program_id(0)
    b_best = tl.full([BLOCK], float("-inf"), tl.float32)
    b_id = tl.zeros([BLOCK], tl.int32) + (ids - 1)  # what is left where all logits are NaN
    for tile in range(0, tiles, BLOCK):
        o_tile = tile + tl.arange(0, BLOCK)
        o_input = o_tile.to(tl.int64) * tokens + i_token
        b_value = tl.load(p_values + o_input, o_tile < tiles, other=float("-inf"))
        b_winner = tl.load(p_winners + o_input, o_tile < tiles, other=0)
        larger = b_value > b_best
        b_best, b_id = tl.where(larger, b_value, b_best), tl.where(larger, b_winner, b_id)
    b_largest = tl.max(b_best, axis=0)
    tl.store(p_chosen + i_token, tl.min(tl.where(b_best == b_largest, b_id, ids - 1), axis=0).to(tl.int64))

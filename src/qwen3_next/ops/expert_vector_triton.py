"""Experts of a handful of tokens: every choice reads its expert alone, without sorting and without tensor cores."""
# pyright: basic, reportCallIssue=false, reportArgumentType=false
# (the two: launches and rounded sizes of kernels, which Triton types as constants or not at all)

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3_next.ops.experts import ExpertScales, SharedExpert
from qwen3_next.ops.quant import FP8_BLOCK
from qwen3_next.ops.quant_triton import rounded, spread

WIDEST = 8_192
"""Channels that one program can hold."""

GATE_UP, GATE_UP_FP8 = {"ROWS": 4, "num_warps": 4}, {"ROWS": 8, "num_warps": 8}
DOWN, DOWN_FP8 = {"ROWS": 4, "num_warps": 4}, {"ROWS": 4, "num_warps": 2}
"""Rows of gate and up, and of the down projection, that a program reads at once. For H100 and H200."""


def vector_experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    experts: Tensor,
    scales: ExpertScales | None,
    shared: SharedExpert | None,
) -> Tensor:
    """`swiglu_experts` in two launches; the shared expert has the same width as the others."""
    (tokens, width), (count, _, hidden), top_k = x.shape, down_proj.shape, experts.shape[1]
    choices = top_k + (shared is not None)
    inner = torch.empty(tokens, choices, hidden, dtype=x.dtype, device=x.device)
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    gate_up_settings, down_settings = (GATE_UP, DOWN) if scales is None else (GATE_UP_FP8, DOWN_FP8)
    own = (None,) * 7 if shared is None else (*shared[:4], *(shared.scales or (None,) * 3))
    gate, up, down, share, gate_scale, up_scale, down_scale = own
    first, second = (None, None) if scales is None else scales
    shape = {"EXPERTS": count, "K": top_k, "WIDTH": width, "HIDDEN": hidden, "SCALE": FP8_BLOCK}
    _gate_up_kernel[(triton.cdiv(hidden, gate_up_settings["ROWS"]), tokens * choices)](
        x, gate_up_proj, first, experts, gate, up, gate_scale, up_scale, share, inner, x.stride(0),
        CHOICES=choices, BLOCK=_block(width), **shape, **gate_up_settings,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(width, down_settings["ROWS"]), tokens)](
        inner, down_proj, second, weights, experts, down, down_scale, result,
        CHOICES=choices, BLOCK=_block(hidden), **shape, **down_settings,
    )  # fmt: skip
    return result


def _block(width: int) -> int:
    return max(FP8_BLOCK, triton.next_power_of_2(width))


@triton.jit
def _gate_up_kernel(
    p_x, p_weight, p_scales, p_experts, p_shared_gate, p_shared_up, p_shared_gate_scales, p_shared_up_scales, p_share,
    p_hidden, x_stride,
    CHOICES: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS hidden channels of one choice. The shared expert's are multiplied by its share here."""
    BLOCKS: tl.constexpr = (WIDTH + SCALE - 1) // SCALE
    i_rows, i_choice = tl.program_id(0), tl.program_id(1) % CHOICES
    i_token = (tl.program_id(1) // CHOICES).to(tl.int64)
    o_channel, o_k = i_rows * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    o_weight = tl.minimum(o_channel, HIDDEN - 1)[:, None] * WIDTH + o_k[None, :]
    expert = tl.load(p_experts + i_token * K + i_choice, i_choice < K, other=0)
    is_here = (expert >= 0) & (expert < EXPERTS)  # of one that is not, nothing is loaded
    expert = tl.where(is_here, expert, 0)
    b_mask = (o_k < WIDTH)[None, :] & is_here
    p_gate = p_weight + expert * (2 * HIDDEN * WIDTH)
    p_up = p_gate + HIDDEN * WIDTH
    if p_scales is not None:
        SCALES: tl.constexpr = (HIDDEN + SCALE - 1) // SCALE * BLOCKS
        p_gate_scale = p_scales + expert * (2 * SCALES) + i_rows * ROWS // SCALE * BLOCKS
        p_up_scale = p_gate_scale + SCALES
    if p_shared_gate is not None:  # noqa: SIM102 (a constant, so apart from what follows)
        if i_choice == K:
            p_gate, p_up = p_shared_gate, p_shared_up
            if p_scales is not None:
                p_gate_scale = p_shared_gate_scales + i_rows * ROWS // SCALE * BLOCKS
                p_up_scale = p_shared_up_scales + i_rows * ROWS // SCALE * BLOCKS
    b_gate_weight = tl.load(p_gate + o_weight, b_mask, other=0.0, eviction_policy="evict_first")
    b_up_weight = tl.load(p_up + o_weight, b_mask, other=0.0, eviction_policy="evict_first")
    b_x = tl.load(p_x + i_token * x_stride + o_k, o_k < WIDTH, other=0.0).to(tl.float32)
    factor = 1.0
    if p_shared_gate is not None:  # noqa: SIM102
        if i_choice == K:
            factor = tl.sigmoid(tl.sum(b_x * tl.load(p_share + o_k, o_k < WIDTH, other=0.0).to(tl.float32), axis=0))
    b_gate_x, b_up_x = b_x, b_x
    if p_scales is not None:
        b_x = rounded(b_x, SCALE, BLOCK)
        b_gate_x = b_x * spread(p_gate_scale, WIDTH, SCALE, BLOCK)
        b_up_x = b_x * spread(p_up_scale, WIDTH, SCALE, BLOCK)
    b_gate = tl.sum(b_gate_weight.to(tl.float32) * b_gate_x[None, :], axis=1)
    b_up = tl.sum(b_up_weight.to(tl.float32) * b_up_x[None, :], axis=1)
    b_hidden = b_gate * tl.sigmoid(b_gate) * b_up * factor
    o_output = tl.program_id(1).to(tl.int64) * HIDDEN + o_channel
    tl.store(p_hidden + o_output, b_hidden.to(p_hidden.dtype.element_ty), o_channel < HIDDEN)


@triton.jit
def _down_kernel(
    p_hidden, p_weight, p_scales, p_weights, p_experts, p_shared, p_shared_scales, p_result,
    CHOICES: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS channels of a token's update: the weighted sum over its choices, written out, so that all loads overlap."""
    BLOCKS: tl.constexpr = (HIDDEN + SCALE - 1) // SCALE
    SCALES: tl.constexpr = (WIDTH + SCALE - 1) // SCALE * BLOCKS
    i_rows, i_token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_output, o_k = i_rows * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    o_weight = tl.minimum(o_output, WIDTH - 1)[:, None] * HIDDEN + o_k[None, :]
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range(CHOICES):
        b_mask = (o_k < HIDDEN)[None, :]
        if i < K:
            expert = tl.load(p_experts + i_token * K + i)
            is_here = (expert >= 0) & (expert < EXPERTS)
            expert = tl.where(is_here, expert, 0)
            b_mask = b_mask & is_here
            p_from, weight = p_weight + expert * (WIDTH * HIDDEN), tl.load(p_weights + i_token * K + i).to(tl.float32)
        else:
            p_from, weight = p_shared, 1.0
        b_weight = tl.load(p_from + o_weight, b_mask, other=0.0, eviction_policy="evict_first")
        b_x = tl.load(p_hidden + (i_token * CHOICES + i) * HIDDEN + o_k, o_k < HIDDEN, other=0.0).to(tl.float32)
        if p_scales is not None:
            if i < K:
                p_scale = p_scales + expert * SCALES + i_rows * ROWS // SCALE * BLOCKS
            else:
                p_scale = p_shared_scales + i_rows * ROWS // SCALE * BLOCKS
            b_x = rounded(b_x, SCALE, BLOCK) * spread(p_scale, HIDDEN, SCALE, BLOCK)
        b_sum += b_weight.to(tl.float32) * (b_x * weight)[None, :]
    b_result = tl.sum(b_sum, axis=1)
    tl.store(p_result + i_token * WIDTH + o_output, b_result.to(p_result.dtype.element_ty), o_output < WIDTH)

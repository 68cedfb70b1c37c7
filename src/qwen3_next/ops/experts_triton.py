"""The mixture of small experts on the GPU: a handful of tokens at the speed of memory, many on the tensor cores.

The host never waits for the device, and the launches depend on shapes alone, so that a CUDA graph can hold them.
"""
# pyright: basic

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.expert_order_triton import ExpertOrder
from qwen3_next.ops.expert_products_triton import (
    combine_kernel,
    gate_up_kernel,
    hidden_gradient_kernel,
    rows_kernel,
    weight_gradient_kernel,
)
from qwen3_next.ops.expert_vector_triton import WIDEST, vector_experts
from qwen3_next.ops.expert_wide_triton import wide_gate_up_kernel, wide_rows_kernel
from qwen3_next.ops.experts import ExpertScales, SharedExpert, check_experts, shared_output, shared_update
from qwen3_next.ops.quant import FP8_BLOCK, ActivationFp8, quantize_activations

VECTOR_TOKENS = 4
"""Up to so many tokens each choice reads its expert alone."""

MOST_EXPERTS = 1_024
"""Experts whose counts one program can hold."""


class Tile(NamedTuple):
    """Rows of the weights and columns of both operands that a program takes at once, and how it runs."""

    ROWS: int
    K: int
    num_warps: int
    num_stages: int


GATE_UP = {16: Tile(64, 128, 4, 3), 32: Tile(64, 64, 4, 4), 64: Tile(128, 64, 8, 4), 128: Tile(128, 64, 8, 4)}
ROWS = {16: Tile(64, 128, 4, 4), 32: Tile(64, 64, 4, 4), 64: Tile(128, 64, 4, 4), 128: Tile(256, 64, 8, 3)}
FP8 = Tile(64, 128, 4, 3)
WIDE_GATE_UP, WIDE_ROWS = Tile(128, 64, 8, 4), Tile(256, 64, 8, 4)
WIDE_GATE_UP_FP8, WIDE_ROWS_FP8 = Tile(128, 128, 8, 3), Tile(128, 128, 4, 3)
"""By the rows of a tile. K of fp8 is one block of scales. For H100 and H200."""

WIDE, WIDE_FP8 = 128, 64
"""Rows of a tile from which on tensor descriptors are worth it."""

SINGLE_PRECISION = Tile(64, 32, 8, 2)
WEIGHT_GRADIENT = {"ROWS": 128, "COLUMNS": 128, "K": 64, "num_warps": 8, "num_stages": 3}
WEIGHT_GRADIENT_SINGLE = {"ROWS": 64, "COLUMNS": 64, "K": 32, "num_warps": 4, "num_stages": 2}


def _refusal(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    experts: Tensor,
    scales: ExpertScales | None = None,
    shared: SharedExpert | None = None,
) -> str | None:
    if x.dtype == torch.float64:
        return "fp64 is not computed on the GPU"
    if scales is None and not x.dtype == gate_up_proj.dtype == down_proj.dtype:
        return "weights of another dtype"
    if not (gate_up_proj.is_contiguous() and down_proj.is_contiguous()):
        return "weights that are not contiguous"
    return None if len(down_proj) <= MOST_EXPERTS else f"up to {MOST_EXPERTS} experts, not {len(down_proj)}"


@refuses(_refusal)
def swiglu_experts(
    x: Float[Tensor, "T D"],
    gate_up_proj: Float[Tensor, "E 2F D"],
    down_proj: Float[Tensor, "E D F"],
    weights: Float[Tensor, "T K"],
    experts: Int[Tensor, "T K"],
    scales: ExpertScales | None = None,
    shared: SharedExpert | None = None,
) -> Float[Tensor, "T D"]:
    """The twin of `ops.experts.swiglu_experts`."""
    check_experts(x, gate_up_proj, down_proj, scales)
    if len(x) == 0:
        return x * 0
    x, weights, experts = x if x.stride(1) == 1 else x.contiguous(), weights.contiguous(), experts.contiguous()
    if (
        scales is None
        and torch.is_grad_enabled()
        and any(y.requires_grad for y in (x, gate_up_proj, down_proj, weights))
    ):
        update = _Experts.apply(x, gate_up_proj, down_proj, weights, experts)
        return update if shared is None else update + shared_update(x, shared)
    fused = shared is not None and _is_alike(shared, gate_up_proj, down_proj, scales)
    own = shared if fused else None
    if len(x) <= VECTOR_TOKENS and max(down_proj.shape[1:]) <= WIDEST:
        update = vector_experts(x, gate_up_proj, down_proj, weights, experts, scales, own)
    else:
        update = _grouped(x, gate_up_proj, down_proj, weights, experts, scales, own)
    return update if shared is None or fused else update + shared_update(x, shared)


def _is_alike(shared: SharedExpert, gate_up_proj: Tensor, down_proj: Tensor, scales: ExpertScales | None) -> bool:
    """Whether the shared expert can be one more of the others."""
    same = shared.down_proj.shape == down_proj.shape[1:] and (shared.scales is None) == (scales is None)
    weights = shared[:3]
    return same and all(w.is_contiguous() and w.dtype == gate_up_proj.dtype for w in weights)


def tile_size(tokens: int, top_k: int, experts: int, largest: int) -> int:
    """Rows of a tile: a power of two that most experts' rows fill well."""
    mean = tokens * top_k / experts
    return min(largest, next((size for size, most in ((16, 8), (32, 20), (64, 48)) if mean <= most), 128))


def _grouped(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    experts: Tensor,
    scales: ExpertScales | None,
    shared: SharedExpert | None,
) -> Tensor:
    (tokens, width), (count, _, hidden), largest = x.shape, down_proj.shape, WIDE if scales is None else WIDE_FP8
    size = tile_size(tokens, experts.shape[1], count, largest)
    if size == largest and _described(gate_up_proj, down_proj):
        return _wide(x, gate_up_proj, down_proj, weights, experts, scales, shared)
    order = ExpertOrder.of(experts, count, size, shared is not None)
    inner = x.new_empty(order.rows, hidden)
    _gate_up(x, gate_up_proj, order, inner, None, scales, shared)
    rows = x.new_empty(order.rows, width)
    _multiply_rows(inner, down_proj, None, order, rows, False, None if scales is None else scales.down, shared)
    share = None if shared is None else F.linear(x, shared.share)
    return _combined(rows, order, weights, rows[experts.numel() :], share)


def _wide(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    experts: Tensor,
    scales: ExpertScales | None,
    shared: SharedExpert | None,
) -> Tensor:
    """Many rows to an expert. The shared expert, which has all of them, is ordinary linear layers."""
    order = ExpertOrder.of(experts, len(down_proj), WIDE if scales is None else WIDE_FP8, shared=False)
    inner = _wide_gate_up(x, gate_up_proj, order, None, None if scales is None else scales.gate_up)
    rows = x.new_empty(order.rows, x.shape[1])
    _wide_rows(inner, down_proj, order, rows, None if scales is None else scales.down)
    if shared is None:
        return _combined(rows, order, weights, None, None)
    return _combined(rows, order, weights, shared_output(x, shared), F.linear(x, shared.share))


def _described(*weights: Tensor) -> bool:
    """Whether tensor descriptors take the weights: whole 16 bytes a row."""
    return all(w.shape[2] * w.element_size() % 16 == 0 for w in weights)


def _gate_up(
    x: Tensor,
    gate_up_proj: Tensor,
    order: ExpertOrder,
    inner: Tensor,
    linear: Tensor | None,
    scales: ExpertScales | None = None,
    shared: SharedExpert | None = None,
) -> None:
    """The hidden channels of every sorted row go to `inner`, gate and up to `linear` where it is given."""
    settings, hidden, tiles = _settings(x, order, GATE_UP, scales), inner.shape[1], order.tiles.shape[1]
    own = (None, None) if shared is None else shared[:2]
    own_scales = (None, None) if shared is None or shared.scales is None else shared.scales[:2]
    gate_up_kernel[(tiles * triton.cdiv(hidden, settings.ROWS),)](
        *(x, gate_up_proj, None if scales is None else scales.gate_up, *own, *own_scales),
        *(order.tokens, order.tiles, inner, linear, tiles, order.tokens.shape[0], x.stride(0)),
        EXPERTS=len(gate_up_proj), WIDTH=x.shape[1], HIDDEN=hidden, SCALE=FP8_BLOCK, TOKENS=order.size,
        **settings._asdict(),
    )  # fmt: skip


def _multiply_rows(
    x: Tensor,
    weight: Tensor,
    tokens: Tensor | None,
    order: ExpertOrder,
    result: Tensor,
    transposed: bool,
    scales: Tensor | None = None,
    shared: SharedExpert | None = None,
) -> None:
    """Sorted rows, or those of `tokens`, times their experts' weights or times these transposed."""
    settings, tiles, outputs = _settings(x, order, ROWS, scales), order.tiles.shape[1], result.shape[1]
    own = None if shared is None else shared.down_proj
    own_scales = None if shared is None or shared.scales is None else shared.scales[2]
    rows_kernel[(tiles * triton.cdiv(outputs, settings.ROWS),)](
        *(x, weight, scales, own, own_scales, tokens, order.tiles, result, tiles, x.stride(0)),
        EXPERTS=len(weight), OUTPUTS=outputs, WIDTH=x.shape[1], SCALE=FP8_BLOCK, TRANSPOSED=transposed,
        TOKENS=order.size, **settings._asdict(),
    )  # fmt: skip


def _settings(x: Tensor, order: ExpertOrder, table: dict[int, Tile], scales: object) -> Tile:
    if scales is not None:
        return FP8
    return SINGLE_PRECISION if x.element_size() > 2 else table[order.size]


def _wide_gate_up(
    x: Tensor, gate_up_proj: Tensor, order: ExpertOrder, linear: Tensor | None, scales: Tensor | None
) -> ActivationFp8 | tuple[Tensor, None]:
    """The hidden channels of every sorted row, in fp8 where the weights are; gate and up to `linear`, if given."""
    settings = _wide_settings(x, scales, WIDE_GATE_UP, WIDE_GATE_UP_FP8)
    (_, rows, width), tiles = gate_up_proj.shape, order.tiles.shape[1]
    values, x_scales = (x, None) if scales is None else quantize_activations(x)
    inner = torch.empty(order.rows, rows // 2, dtype=values.dtype, device=x.device), None
    if scales is not None:
        inner = ActivationFp8(inner[0], x.new_empty(order.rows, triton.cdiv(rows // 2, FP8_BLOCK), dtype=torch.float32))
    weight = TensorDescriptor.from_tensor(gate_up_proj.view(-1, width), [settings.ROWS, settings.K])
    wide_gate_up_kernel[(tiles * triton.cdiv(rows // 2, settings.ROWS),)](
        *(values, x_scales, weight, scales, order.tokens, order.tiles, *inner, linear, tiles, values.stride(0)),
        WIDTH=width, HIDDEN=rows // 2, SCALE=FP8_BLOCK, TOKENS=order.size, **settings._asdict(),
    )  # fmt: skip
    return inner


def _wide_rows(
    x: ActivationFp8 | tuple[Tensor, None], weight: Tensor, order: ExpertOrder, result: Tensor, scales: Tensor | None
) -> None:
    settings = _wide_settings(result, scales, WIDE_ROWS, WIDE_ROWS_FP8)
    (_, outputs, width), tiles = weight.shape, order.tiles.shape[1]
    rows = TensorDescriptor.from_tensor(x[0], [order.size, settings.K])
    weights = TensorDescriptor.from_tensor(weight.view(-1, width), [settings.ROWS, settings.K])
    wide_rows_kernel[(tiles * triton.cdiv(outputs, settings.ROWS),)](
        *(rows, x[1], weights, scales, order.tiles, result, tiles),
        OUTPUTS=outputs, WIDTH=width, SCALE=FP8_BLOCK, TOKENS=order.size, **settings._asdict(),
    )  # fmt: skip


def _wide_settings(x: Tensor, scales: Tensor | None, ordinary: Tile, fp8: Tile) -> Tile:
    if scales is not None:  # the products are of fp8 whatever `x` is
        return fp8
    return SINGLE_PRECISION if x.element_size() > 2 else ordinary


def _combined(
    rows: Tensor, order: ExpertOrder, weights: Tensor | None, shared: Tensor | None, share: Tensor | None
) -> Tensor:
    (tokens, top_k), width = order.places.shape, rows.shape[1]
    result = rows.new_empty(tokens, width)
    block = min(2_048, triton.next_power_of_2(width))
    combine_kernel[(tokens, triton.cdiv(width, block))](
        rows, shared, order.places, weights, share, result, K=top_k, WIDTH=width, BLOCK=block
    )
    return result


class _Experts(torch.autograd.Function):
    """Keeps gate and up of every row; all else is computed again or never needed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weights: Tensor, experts: Tensor
    ) -> Tensor:
        count, width, hidden = down_proj.shape
        size = tile_size(len(x), experts.shape[1], count, WIDE)
        order = ExpertOrder.of(experts, count, size, shared=False)
        linear, rows = x.new_empty(order.rows, 2 * hidden), x.new_empty(order.rows, width)
        if size == WIDE and _described(gate_up_proj, down_proj):
            _wide_rows(_wide_gate_up(x, gate_up_proj, order, linear, None), down_proj, order, rows, None)
        else:
            inner = x.new_empty(order.rows, hidden)
            _gate_up(x, gate_up_proj, order, inner, linear)
            _multiply_rows(inner, down_proj, None, order, rows, transposed=False)
        ctx.save_for_backward(x, gate_up_proj, down_proj, weights, linear)
        ctx.order = order
        return _combined(rows, order, weights, None, None)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up_proj, down_proj, weights, linear = ctx.saved_tensors
        order, gradient, hidden = ctx.order, grads[0].contiguous(), down_proj.shape[2]
        d_unweighted = x.new_empty(order.rows, hidden)
        _multiply_rows(gradient, down_proj, order.tokens, order, d_unweighted, transposed=True)
        d_linear, weighted, d_weights = (
            torch.empty_like(linear),
            torch.empty_like(d_unweighted),
            torch.empty_like(weights),
        )
        hidden_gradient_kernel[(order.rows,)](
            linear, d_unweighted, weights, order.places, d_linear, weighted, d_weights,
            HIDDEN=hidden, BLOCK=triton.next_power_of_2(hidden), num_warps=4 if hidden > 256 else 1,
        )  # fmt: skip
        d_x = d_gate_up = d_down = None
        if ctx.needs_input_grad[0]:
            rows = x.new_empty(order.rows, x.shape[1])
            _multiply_rows(d_linear, gate_up_proj, None, order, rows, transposed=True)
            d_x = _combined(rows, order, None, None, None)
        if ctx.needs_input_grad[1]:
            d_gate_up = _weight_gradient(d_linear, x, None, order.tokens, order, gate_up_proj)
        if ctx.needs_input_grad[2]:
            d_down = _weight_gradient(gradient, weighted, order.tokens, None, order, down_proj)
        return d_x, d_gate_up, d_down, d_weights if ctx.needs_input_grad[3] else None, None


def _weight_gradient(
    left: Tensor,
    right: Tensor,
    left_tokens: Tensor | None,
    right_tokens: Tensor | None,
    order: ExpertOrder,
    like: Tensor,
) -> Tensor:
    result, (count, outputs, width) = torch.empty_like(like), like.shape
    settings = WEIGHT_GRADIENT if like.element_size() <= 2 else WEIGHT_GRADIENT_SINGLE
    weight_gradient_kernel[(triton.cdiv(width, settings["COLUMNS"]), triton.cdiv(outputs, settings["ROWS"]), count)](
        left, right, left_tokens, right_tokens, order.borders, result, left.stride(0), right.stride(0),
        OUTPUTS=outputs, WIDTH=width, **settings,
    )  # fmt: skip
    return result

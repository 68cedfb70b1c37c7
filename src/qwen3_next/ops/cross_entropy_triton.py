"""The loss of a linear head on the GPU: a matrix product whose logits are used up where they are computed.

Forward, every tile of tokens x ids leaves the largest logit of each token and a sum of exponentials; backward, the
gradients of a block of logits, which two ordinary products turn into those of the inputs.
"""
# pyright: basic

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.common_triton import dot
from qwen3_next.ops.cross_entropy import IGNORED

WIDE = {"TOKENS": 128, "IDS": 256, "K": 64, "GROUP": 16, "num_warps": 8, "num_stages": 4}
NARROW = {"TOKENS": 128, "IDS": 128, "K": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3}
SINGLE_PRECISION = {"TOKENS": 64, "IDS": 128, "K": 32, "GROUP": 16, "num_warps": 4, "num_stages": 3}
"""Tokens and ids of a program, columns of a step of its product, tiles of tokens that share the ids in the cache.

For H100 and H200. Where the hidden states are narrow, the exponentials take as long as the product: two programs on a
multiprocessor then do both at once.
"""

COMBINE = {"TOKENS": 16, "TILES": 64, "K": 256, "num_warps": 4}

PARTIAL_BYTES = 64 * 2**20
"""Of what the tiles of one launch leave."""

GRADIENT_BYTES = 512 * 2**20
"""Of a block of logits' gradients."""

LOG2_E = tl.constexpr(1.4426950408889634)


def _refusal(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = IGNORED) -> str | None:
    if hidden.dtype == torch.float64:
        return "fp64 is not computed on the GPU"
    if hidden.dtype != weight.dtype:
        return "a weight of another dtype"
    if hidden.dtype == torch.float16 and _differentiable(hidden, weight):
        return "gradients of single logits would vanish in fp16"
    return None


def _differentiable(hidden: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)


@refuses(_refusal)
def linear_cross_entropy(
    hidden: Float[Tensor, "T D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, "T"], ignore_index: int = IGNORED
) -> Float[Tensor, "T"]:
    """The twin of `ops.cross_entropy.linear_cross_entropy`. A target that is no id makes the loss NaN."""
    if _differentiable(hidden, weight):
        return _LinearCrossEntropy.apply(hidden, weight, targets, ignore_index)
    return _losses(aligned(hidden), aligned(weight), targets, ignore_index)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        losses, log_sums = _losses(aligned(hidden), aligned(weight), targets, ignore_index)
        ctx.save_for_backward(hidden, weight, targets, log_sums)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, weight, targets, log_sums = ctx.saved_tensors
        scales = grads[0] * (targets != ctx.ignore_index)
        logits = _LogitsGradient(hidden, weight, targets, log_sums, scales)
        return *logits.differentiate(*ctx.needs_input_grad[:2]), None, None


class _LogitsGradient:
    """The gradient of the logits, block by block, and what it makes of the inputs.

    Blocks are cut along tokens or ids, whichever there are more of: the gradient of that side is finished with its
    block, the other is summed up in fp32 and the smaller one.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, targets: Tensor, log_sums: Tensor, scales: Tensor) -> None:
        self.hidden, self.weight = hidden, weight
        self.of_token = targets.contiguous(), log_sums, scales.contiguous()
        self.operands = aligned(hidden), aligned(weight)

    def differentiate(self, of_hidden: bool, of_weight: bool) -> tuple[Tensor | None, Tensor | None]:
        tokens, ids = self.hidden.shape[0], self.weight.shape[0]
        if tokens > ids:
            return self._cut(self.hidden, self.weight, of_hidden, of_weight, False)
        d_weight, d_hidden = self._cut(self.weight, self.hidden, of_weight, of_hidden, True)
        return d_hidden, d_weight

    def _cut(
        self, longer: Tensor, other: Tensor, of_longer: bool, of_other: bool, by_ids: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        d_longer = torch.empty_like(longer, memory_format=torch.contiguous_format) if of_longer else None
        total = torch.zeros_like(other, dtype=torch.float32) if of_other else None
        for first, count in _blocks(longer.shape[0], other.shape[0] * longer.element_size(), GRADIENT_BYTES):
            part = slice(first, first + count)
            gradient = self._block(first, count, by_ids)  # [tokens, ids]
            if d_longer is not None:
                torch.mm(gradient.t() if by_ids else gradient, other, out=d_longer[part])
            if total is not None:
                _add_product(total, gradient if by_ids else gradient.t(), longer[part])
        return d_longer, None if total is None else total.to(other.dtype)

    def _block(self, first: int, count: int, by_ids: bool) -> Tensor:
        tokens, ids = self.hidden.shape[0], self.weight.shape[0]
        tokens, ids = (tokens, count) if by_ids else (count, ids)
        first_token, first_id = (0, first) if by_ids else (first, 0)
        gradient = self.hidden.new_empty(tokens, ids)
        tile = _tile(self.hidden)
        grid = triton.cdiv(tokens, tile["TOKENS"]) * triton.cdiv(ids, tile["IDS"])
        if grid:
            _gradient_kernel[(grid,)](
                *_descriptors(*self.operands, tile), *self.of_token, gradient, first_token, tokens, first_id, ids,
                WIDTH=self.hidden.shape[1], **tile,
            )  # fmt: skip
        return gradient


def _losses(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Float[Tensor, "T"], Float[Tensor, "T"]]:
    """The losses and the logarithms of the sums of exponentials."""
    tokens, ids, width = hidden.shape[0], weight.shape[0], hidden.shape[1]
    losses, log_sums = hidden.new_empty(2, tokens, dtype=torch.float32).unbind()
    tile = _tile(hidden)
    tiles = triton.cdiv(ids, tile["IDS"])
    for first, count in _blocks(tokens, 8 * tiles, PARTIAL_BYTES):
        largest, sums = hidden.new_empty(2, tiles, count, dtype=torch.float32).unbind()
        _tile_kernel[(triton.cdiv(count, tile["TOKENS"]) * tiles,)](
            *_descriptors(hidden, weight, tile), largest, sums, first, count, ids, WIDTH=width, **tile
        )
        _combine_kernel[(triton.cdiv(count, COMBINE["TOKENS"]),)](
            *(hidden, weight, targets.contiguous(), largest, sums, losses, log_sums),
            *(hidden.stride(0), weight.stride(0), first, count, tiles, ids, ignore_index),
            WIDTH=width, **COMBINE,
        )  # fmt: skip
    return losses, log_sums


def _blocks(count: int, bytes_of_one: int, limit: int) -> list[tuple[int, int]]:
    """Equal parts of `count` things that stay below a limit, in multiples of 256: where each begins, its size."""
    parts = max(1, triton.cdiv(count * bytes_of_one, limit))
    size = max(1, triton.cdiv(triton.cdiv(count, parts), 256)) * 256
    return [(first, min(size, count - first)) for first in range(0, count, size)]


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in fp32; the tensor cores sum 16-bit numbers so without a copy of them."""
    if a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def aligned(x: Tensor) -> Tensor:
    """`x` as the card's copy engine takes it: at addresses and with rows of multiples of 16 bytes; else a copy."""
    step = 16 // x.element_size()
    if x.stride(1) == 1 and x.stride(0) % step == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(x.shape[0], triton.cdiv(x.shape[1], step) * step)
    padded[:, : x.shape[1]] = x
    return padded[:, : x.shape[1]]


def _tile(hidden: Tensor) -> dict[str, int]:
    if hidden.element_size() > 2:
        return SINGLE_PRECISION
    return WIDE if hidden.shape[1] >= 1024 else NARROW


def _descriptors(hidden: Tensor, weight: Tensor, tile: dict[str, int]) -> tuple[TensorDescriptor, TensorDescriptor]:
    shapes = [tile["TOKENS"], tile["K"]], [tile["IDS"], tile["K"]]
    return TensorDescriptor.from_tensor(hidden, shapes[0]), TensorDescriptor.from_tensor(weight, shapes[1])


@triton.jit
def _tile_of(tokens, ids, TOKENS: tl.constexpr, IDS: tl.constexpr, GROUP: tl.constexpr):
    """Programs that run side by side share their tokens and ids: first along GROUP tiles of tokens, then the ids."""
    token_tiles, id_tiles = tl.cdiv(tokens, TOKENS), tl.cdiv(ids, IDS)
    first = tl.program_id(0) // (GROUP * id_tiles) * GROUP
    size = tl.minimum(token_tiles - first, GROUP)
    rest = tl.program_id(0) % (GROUP * id_tiles)
    return first + rest % size, rest // size


@triton.jit
def _logits(hidden, weight, token, first_id, WIDTH: tl.constexpr, TOKENS: tl.constexpr, IDS: tl.constexpr,
            K: tl.constexpr):  # fmt: skip
    """Tokens x ids from the given first ones on; zeros beyond the last."""
    b_logits = tl.zeros([TOKENS, IDS], tl.float32)
    for k in range(0, WIDTH, K):
        b_logits = dot(hidden.load([token, k]), weight.load([first_id, k]).T, b_logits)
    return b_logits


@triton.jit(do_not_specialize=["first", "tokens"])
def _tile_kernel(
    hidden, weight, p_largest, p_sums, first, tokens, ids,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, IDS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The largest logit of each token among the ids of a tile, and the sum of the exponentials relative to it."""
    i_token, i_ids = _tile_of(tokens, ids, TOKENS, IDS, GROUP)
    b_logits = _logits(hidden, weight, first + i_token * TOKENS, i_ids * IDS, WIDTH, TOKENS, IDS, K) * LOG2_E
    o_token, o_id = i_token * TOKENS + tl.arange(0, TOKENS), i_ids * IDS + tl.arange(0, IDS)
    b_logits = tl.where((o_id < ids)[None, :], b_logits, float("-inf"))
    b_largest = tl.max(b_logits, axis=1)
    b_sum = tl.sum(tl.exp2(b_logits - b_largest[:, None]), axis=1)
    o_partial = i_ids.to(tl.int64) * tokens + o_token
    tl.store(p_largest + o_partial, b_largest, o_token < tokens)
    tl.store(p_sums + o_partial, b_sum, o_token < tokens)


@triton.jit(do_not_specialize=["first", "tokens", "ignore_index"])
def _combine_kernel(
    p_hidden, p_weight, p_targets, p_largest, p_sums, p_losses, p_log_sums,
    hidden_stride, weight_stride, first, tokens, tiles, ids, ignore_index,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """What the tiles left of some tokens, together with the logits of their targets."""
    o_token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    b_largest = tl.full([TOKENS], float("-inf"), tl.float32)
    b_sum = tl.zeros([TOKENS], tl.float32)
    for tile in range(0, tiles, TILES):
        o_tile = tile + tl.arange(0, TILES)
        exists = (o_tile < tiles)[:, None] & (o_token < tokens)[None, :]
        o_partial = o_tile.to(tl.int64)[:, None] * tokens + o_token[None, :]
        b_largests = tl.load(p_largest + o_partial, exists, other=float("-inf"))
        b_sums = tl.load(p_sums + o_partial, exists, other=0.0)
        b_new = tl.maximum(b_largest, tl.max(b_largests, axis=0))
        b_new = tl.where(o_token < tokens, b_new, 0.0)
        b_sum = b_sum * tl.exp2(b_largest - b_new) + tl.sum(b_sums * tl.exp2(b_largests - b_new[None, :]), axis=0)
        b_largest = b_new
    b_log_sum = (b_largest + tl.log2(tl.where(o_token < tokens, b_sum, 1.0))) / LOG2_E
    b_target = tl.load(p_targets + first + o_token, o_token < tokens, other=0)
    counts = b_target != ignore_index
    is_id = (b_target >= 0) & (b_target < ids)
    b_logit = tl.zeros([TOKENS], tl.float32)
    for k in range(0, WIDTH, K):
        o_k = k + tl.arange(0, K)
        exists = ((o_token < tokens) & counts & is_id)[:, None] & (o_k < WIDTH)[None, :]
        o_hidden = (first + o_token).to(tl.int64)[:, None] * hidden_stride + o_k[None, :]
        o_weight = b_target.to(tl.int64)[:, None] * weight_stride + o_k[None, :]
        b_hidden = tl.load(p_hidden + o_hidden, exists, other=0.0).to(tl.float32)
        b_logit += tl.sum(b_hidden * tl.load(p_weight + o_weight, exists, other=0.0).to(tl.float32), axis=1)
    b_loss = tl.where(is_id, b_log_sum - b_logit, float("nan"))
    tl.store(p_losses + first + o_token, tl.where(counts, b_loss, 0.0), o_token < tokens)
    tl.store(p_log_sums + first + o_token, b_log_sum, o_token < tokens)


@triton.jit(do_not_specialize=["first_token", "tokens", "first_id"])
def _gradient_kernel(
    hidden, weight, p_targets, p_log_sums, p_scales, p_gradient, first_token, tokens, first_id, ids,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, IDS: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """softmax - onehot, times the scale of each token."""
    i_token, i_ids = _tile_of(tokens, ids, TOKENS, IDS, GROUP)
    o_token, o_id = i_token * TOKENS + tl.arange(0, TOKENS), i_ids * IDS + tl.arange(0, IDS)
    b_logits = _logits(hidden, weight, first_token + i_token * TOKENS, first_id + i_ids * IDS, WIDTH, TOKENS, IDS, K)
    exists = o_token < tokens
    b_log_sum = tl.load(p_log_sums + first_token + o_token, exists, other=0.0) * LOG2_E
    b_scale = tl.load(p_scales + first_token + o_token, exists, other=0.0)
    b_target = tl.load(p_targets + first_token + o_token, exists, other=-1) - first_id
    b_gradient = tl.exp2(b_logits * LOG2_E - b_log_sum[:, None])
    b_gradient = tl.where(o_id[None, :] == b_target[:, None], b_gradient - 1.0, b_gradient) * b_scale[:, None]
    p_rows = p_gradient + o_token.to(tl.int64)[:, None] * ids
    b_gradient = b_gradient.to(p_gradient.dtype.element_ty)
    tl.store(p_rows + o_id[None, :], b_gradient, exists[:, None] & (o_id < ids)[None, :])

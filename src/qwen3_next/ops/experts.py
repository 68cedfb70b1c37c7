"""The mixture of small experts: grouped SwiGLU, weighted sum, and the expert that every token uses."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.gate import swiglu
from qwen3_next.ops.linear import linear
from qwen3_next.ops.quant import block_scale_shape

ExpertFunction = Callable[[Tensor, int], Tensor]
"""Maps the rows of an expert, with its number, to its outputs."""

_FEW_PAIRS = 256
"""Up to this many pairs one concatenation costs less than an addition per expert."""


class ExpertScales(NamedTuple):
    """The scales of experts whose weights are block-fp8, see `dequantize_block_fp8`.

    Attributes:
        gate_up: `[E, 2 * ceil(F / 128), ceil(D / 128)]`, the blocks of the gate, then those of the up projection.
        down: `[E, ceil(D / 128), ceil(F / 128)]`.
    """

    gate_up: Float[Tensor, "E 2FB DB"]
    down: Float[Tensor, "E DB FB"]


class SharedExpert(NamedTuple):
    """The expert that every token uses, with the share `sigmoid(share x)`.

    Attributes:
        gate_proj, up_proj: `[F, D]`.
        down_proj: `[D, F]`.
        share: `[1, D]`.
        scales: of block-fp8 weights, in the order gate, up, down; None of ordinary ones.
    """

    gate_proj: Float[Tensor, "F D"]
    up_proj: Float[Tensor, "F D"]
    down_proj: Float[Tensor, "D F"]
    share: Float[Tensor, "1 D"]
    scales: tuple[Tensor, Tensor, Tensor] | None = None


@accelerated("experts_triton")
def swiglu_experts(
    x: Float[Tensor, "T D"],
    gate_up_proj: Float[Tensor, "E 2F D"],
    down_proj: Float[Tensor, "E D F"],
    weights: Float[Tensor, "T K"],
    experts: Int[Tensor, "T K"],
    scales: ExpertScales | None = None,
    shared: SharedExpert | None = None,
) -> Float[Tensor, "T D"]:
    """`sum_k weights_k down_k(silu(gate_k x) * up_k x)` over the K chosen experts of each token, and the shared one.

    Rows 0..F-1 of an expert's `gate_up_proj` are its gate, rows F..2F-1 its up projection. (Shazeer 2020,
    arXiv:2002.05202, eq. 6 for SwiGLU; Dai et al. 2024, arXiv:2401.06066, section 3.2, for the shared expert, whose
    share is Qwen's.) Tokens are sorted by expert so that each expert is one matrix product.

    Args:
        experts: numbers outside 0..E-1 are experts that are not here, on another device: those choices add nothing.
        scales: of e4m3 weights; what is multiplied with those is rounded as in `linear`, and there is no gradient.
        shared: added with its share where it is given; it has the same hidden width F or another.

    Raises:
        InputError: e4m3 weights without scales, scales that do not fit, or a gradient through e4m3 weights.
    """
    check_experts(x, gate_up_proj, down_proj, scales)
    update = _chosen(x, gate_up_proj, down_proj, weights, experts, scales)
    return update if shared is None else update + shared_update(x, shared)


def shared_update(x: Float[Tensor, "T D"], shared: SharedExpert) -> Float[Tensor, "T D"]:
    """`sigmoid(share x) down(silu(gate x) * up x)`."""
    return torch.sigmoid(F.linear(x, shared.share)) * shared_output(x, shared)


def shared_output(x: Float[Tensor, "T D"], shared: SharedExpert) -> Float[Tensor, "T D"]:
    """`down(silu(gate x) * up x)`."""
    gate, up, down = (None, None, None) if shared.scales is None else shared.scales
    hidden = swiglu(linear(x, shared.gate_proj, gate), linear(x, shared.up_proj, up))
    return linear(hidden, shared.down_proj, down)


def check_experts(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, scales: ExpertScales | None) -> None:
    """That e4m3 weights come with scales of the right shape, and others without; that no gradient has to pass those.

    Raises:
        InputError: otherwise.
    """
    quantized = [w.dtype == torch.float8_e4m3fn for w in (gate_up_proj, down_proj)]
    if any(quantized) != (scales is not None) or any(quantized) != all(quantized):
        raise InputError(
            f"gate_up_proj is {gate_up_proj.dtype}, down_proj {down_proj.dtype} and scales are "
            f"{'missing' if scales is None else 'given'}; both projections are e4m3 with scales, or neither."
        )
    if scales is None:
        return
    count, hidden, width = down_proj.shape
    rows, columns = block_scale_shape((hidden, width))
    gate_up, down = (count, 2 * columns, rows), (count, rows, columns)
    if (scales.gate_up.shape, scales.down.shape) != (gate_up, down):
        raise InputError(
            f"the scales have the shapes {list(scales.gate_up.shape)} and {list(scales.down.shape)}; these experts "
            f"need {list(gate_up)} and {list(down)}."
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise InputError(
            "fp8 experts are for inference: x asks for a gradient; call under torch.no_grad(), or train with ordinary "
            "weights."
        )


def _chosen(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, weights: Tensor, experts: Tensor, scales: ExpertScales | None
) -> Tensor:
    if experts.numel() == 0:
        return x * 0
    by_expert, order = experts.flatten().sort(stable=True)
    hit, sizes = (found.tolist() for found in by_expert.unique_consecutive(return_counts=True))
    here = _expert_functions(gate_up_proj, down_proj, scales)

    def function(rows: Tensor, e: int) -> Tensor:
        return here(rows, e) if 0 <= e < len(down_proj) else torch.zeros_like(rows)

    loop = _looped if torch.is_grad_enabled() or order.numel() <= _FEW_PAIRS else _looped_in_place
    return loop(x, function, weights, order, hit, sizes)


def _expert_functions(gate_up_proj: Tensor, down_proj: Tensor, scales: ExpertScales | None) -> ExpertFunction:
    """What one expert does with its rows."""
    first, second = gate_up_proj, down_proj
    if scales is not None:
        return lambda x, e: _swiglu_fp8(x, first[e], second[e], scales.gate_up[e], scales.down[e])
    if torch.is_grad_enabled():
        # Indexing one expert costs a full-size gradient each; unbind costs one for all of them together.
        ups, downs = first.unbind(0), second.unbind(0)
        return lambda x, e: _swiglu(x, ups[e], downs[e])
    return lambda x, e: _swiglu(x, first[e], second[e])


def _permuted(
    x: Float[Tensor, "R D"], source: Int[Tensor, "P"], inverse: Int[Tensor, "P"], copies: int
) -> Float[Tensor, "P D"]:
    """`x[source]`, where every row is taken `copies` times and `inverse` tells where its copies went."""
    return _Permutation.apply(x, source, inverse, copies)  # type: ignore[no-any-return]


class _Permutation(torch.autograd.Function):
    """A gather whose gradient is a gather as well: faster than scattered additions, and the same on every run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[source]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0][inverse]
        return grad.unflatten(0, (-1, ctx.copies)).sum(dim=1) if ctx.copies > 1 else grad, None, None, None


def _looped(
    x: Tensor, expert: ExpertFunction, weights: Tensor, order: Tensor, hit: Sequence[int], sizes: list[int]
) -> Tensor:
    """One expert that was hit after the other."""
    inverse = _inverse(order)
    rows = _permuted(x, order // weights.shape[1], inverse, weights.shape[1]).split(sizes)
    outputs = torch.cat([expert(part, e) for part, e in zip(rows, hit, strict=True)])
    return _combined(_permuted(outputs, inverse, order, 1), weights)


def _looped_in_place(
    x: Tensor, expert: ExpertFunction, weights: Tensor, order: Tensor, hit: Sequence[int], sizes: list[int]
) -> Tensor:
    """The same without gradients: each expert's rows stay in a CPU's cache from the gather to the sum in fp32."""
    total = torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    tokens, shares = order // weights.shape[1], weights.flatten()[order, None].to(total.dtype)
    for e, of_expert, share in zip(hit, tokens.split(sizes), shares.split(sizes), strict=True):
        total.index_add_(0, of_expert, expert(x[of_expert], e) * share)
    return total.to(x.dtype)


def _swiglu(x: Float[Tensor, "P D"], gate_up: Float[Tensor, "2F D"], down: Float[Tensor, "D F"]) -> Tensor:
    gate, up = (x @ gate_up.t()).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ down.t()


def _swiglu_fp8(x: Tensor, gate_up: Tensor, down: Tensor, gate_up_scales: Tensor, down_scales: Tensor) -> Tensor:
    """Gate and up are quantised apart: a block of scales never holds rows of both."""
    parts = zip(gate_up.chunk(2), gate_up_scales.chunk(2), strict=True)
    gate, up = (linear(x, weight, scale) for weight, scale in parts)
    return linear(swiglu(gate, up), down, down_scales)


def _combined(outputs: Float[Tensor, "T_times_K D"], weights: Float[Tensor, "T K"]) -> Float[Tensor, "T D"]:
    return (outputs.unflatten(0, weights.shape) * weights[..., None]).sum(dim=1)


def _inverse(order: Int[Tensor, "P"]) -> Int[Tensor, "P"]:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))

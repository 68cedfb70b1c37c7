"""Root-mean-square norms: the zero-centred one of the residual stream and the gated one after the delta rule."""

from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.backend import accelerated


class AddedNorm(NamedTuple):
    """A residual stream after an addition, and its norm."""

    normed: Float[Tensor, "*B D"]
    stream: Float[Tensor, "*B D"]


@accelerated("norm_triton")
def add_rms_norm(
    x: Float[Tensor, "*B D"], residual: Float[Tensor, "*B D"], weight: Float[Tensor, "D"], eps: float
) -> AddedNorm:
    """`stream = x + residual`, rounded to their dtype, and `normed = rms_norm(stream, weight, eps)`.

    The end of one layer and the beginning of the next, which read the stream together.
    """
    stream = x + residual
    return AddedNorm(rms_norm(stream, weight, eps), stream)


@accelerated("norm_triton")
def rms_norm(x: Float[Tensor, "*B D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*B D"]:
    """Zero-centred RMS norm: `x / sqrt(mean(x^2) + eps) * (1 + weight)`, in fp32, cast to `x.dtype` last.

    "Zero-centred" names the stored weight, whose resting value is 0: the mean of `x` is not subtracted.
    (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4; the `1 + weight` form is Qwen3-Next's.)
    """
    scale = 1.0 + weight.float()
    return F.rms_norm(x.float(), (x.shape[-1],), scale, eps).to(x.dtype)


@accelerated("norm_triton")
def gated_rms_norm(
    x: Float[Tensor, "*B Dv"], gate: Float[Tensor, "*B Dv"], weight: Float[Tensor, "Dv"], eps: float
) -> Float[Tensor, "*B Dv"]:
    """Norm each head, then gate it: `x / sqrt(mean(x^2) + eps) * weight * silu(gate)`.

    The normalised value is rounded to `x.dtype` before it meets the weight, and the gate acts in fp32, as the published
    model computes it. (Yang et al. 2024, arXiv:2412.06464, section 3.4, output gate.)
    """
    normed = F.rms_norm(x, (x.shape[-1],), None, eps) * weight  # computed in fp32, rounded to x.dtype
    return (normed * F.silu(gate.float())).to(x.dtype)

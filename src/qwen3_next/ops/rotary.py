"""Rotary position embedding on the first part of each head, with YaRN for contexts beyond the trained one."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.norm import rms_norm


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """The settings of YaRN (Peng et al. 2023, arXiv:2309.00071).

    Attributes:
        factor: context extension, at least 1.
        original_length: the context that the model was trained at, in tokens.
        beta_fast: rotations over the original context above which a frequency is kept.
        beta_slow: rotations below which a frequency is divided by `factor`.
        attention_factor: multiplies cos and sin; None takes `m(mscale) / m(mscale_all_dim)` with
            `m(s) = 0.1 s ln(factor) + 1`: the paper's `0.1 ln(factor) + 1` (section 3.4) at the defaults.
        mscale: of the numerator, for the dimensions that are rotated.
        mscale_all_dim: of the denominator, for what a model scales over all dimensions anyway (DeepSeek's convention).
        truncate: round the borders of the ramp to whole dimensions.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


def rotary_frequencies(
    rotary_dim: int, theta: float, linear_factor: float = 1.0, yarn: YarnScaling | None = None
) -> Float[Tensor, "R"]:
    """The R = rotary_dim / 2 angular frequencies, in radians per token, fp32.

    Args:
        rotary_dim: how many leading dimensions of a head are rotated (even).
        theta: base of the geometric series (Su et al. 2021, arXiv:2104.09864, section 3.2.2).
        linear_factor: divides every frequency ("linear" position interpolation).
        yarn: blends kept and divided frequencies ("NTK-by-parts", arXiv:2309.00071, eq. 17-19).
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    frequencies = 1.0 / (theta**exponents) / linear_factor
    if yarn is None:
        return frequencies
    kept = _share_kept(rotary_dim, theta, yarn)
    return frequencies / yarn.factor * (1 - kept) + frequencies * kept


def stretched_theta(theta: float, rotary_dim: int, factor: float, length: int, trained_length: int) -> float:
    """The base for a sequence of `length` tokens ("dynamic" scaling): `theta` up to the trained length, then larger.

    `theta (factor length / trained_length - (factor - 1))^(R / (R - 1))` with R = rotary_dim / 2: the slowest
    frequency is interpolated and the fastest kept. (Peng et al. 2023, arXiv:2309.00071, section 3.3 and appendix A.1.)
    """
    stretch = factor * max(length, trained_length) / trained_length - (factor - 1)
    return theta * stretch ** (rotary_dim / (rotary_dim - 2))


def yarn_attention_factor(yarn: YarnScaling | None) -> float:
    """What cos and sin are multiplied with so that attention keeps its temperature over a longer context."""
    if yarn is None:
        return 1.0
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return _temperature(yarn.factor, yarn.mscale) / _temperature(yarn.factor, yarn.mscale_all_dim)


def _temperature(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _share_kept(rotary_dim: int, theta: float, yarn: YarnScaling) -> Float[Tensor, "R"]:
    """1 for the fast dimensions that keep their frequency, 0 for the slow ones, a ramp between."""
    low, high = (_dimension_of(turns, rotary_dim, theta, yarn) for turns in (yarn.beta_fast, yarn.beta_slow))
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    width = high - low if high != low else 0.001
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / width
    return 1 - ramp.clamp(0, 1)


def _dimension_of(turns: float, rotary_dim: int, theta: float, yarn: YarnScaling) -> float:
    """The dimension that turns this often over the original context."""
    return rotary_dim * math.log(yarn.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))


def rotary_tables(
    positions: Int[Tensor, "*T"], frequencies: Float[Tensor, "R"], attention_factor: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "*T 1 R"], Float[Tensor, "*T 1 R"]]:
    """cos and sin of every angle, computed in fp32 and rounded once to `dtype`, ready to broadcast over heads."""
    angles = positions[..., None].float() * frequencies
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)


@accelerated("rotary_triton")
def rms_norm_rotary(
    x: Float[Tensor, "T H Dh"],
    weight: Float[Tensor, "Dh"],
    eps: float,
    cos: Float[Tensor, "T 1 R"],
    sin: Float[Tensor, "T 1 R"],
) -> Float[Tensor, "T H Dh"]:
    """Norm each head, then rotate it: `apply_rotary(rms_norm(x, weight, eps), cos, sin)`, for queries and keys."""
    return apply_rotary(rms_norm(x, weight, eps), cos, sin)


@accelerated("rotary_triton")
def apply_rotary(
    x: Float[Tensor, "T H Dh"], cos: Float[Tensor, "T 1 R"], sin: Float[Tensor, "T 1 R"]
) -> Float[Tensor, "T H Dh"]:
    """Rotate the first 2R dimensions of each head; the others pass unchanged.

    Dimension i turns together with dimension i + R (the "half-split" pairing): a' = a cos - b sin, b' = b cos + a sin.
    (Su et al. 2021, arXiv:2104.09864, eq. 34.)
    """
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    return torch.cat([*turned, rest], dim=-1)

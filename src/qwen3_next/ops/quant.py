"""Block-scaled fp8: the weights of the published FP8 checkpoints, and the activations that are multiplied with them.

(DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.2: fine-grained quantisation with one scale per 128 x 128 block of a
weight and per 1 x 128 tile of an activation.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.backend import accelerated

FP8_BLOCK = 128
"""Rows and columns of a weight that share one scale; the last block of a row or column may be smaller."""

FP8_LARGEST = 448.0
"""The largest number of e4m3."""

_NAN_CODE = 0x7F


class BlockFp8(NamedTuple):
    """A weight with one scale per 128 x 128 block.

    Attributes:
        values: `[*E, O, I]` e4m3.
        scale_inv: `[*E, ceil(O / 128), ceil(I / 128)]` fp32, the factors that give the weight back.
    """

    values: Float8e4m3fn[Tensor, "*E O I"]
    scale_inv: Float[Tensor, "*E OB IB"]


class ActivationFp8(NamedTuple):
    """Activations with one scale per token and 128 channels.

    Attributes:
        values: `[T, I]` e4m3.
        scales: `[T, ceil(I / 128)]` fp32, the factors that give the activations back.
    """

    values: Float8e4m3fn[Tensor, "T I"]
    scales: Float[Tensor, "T IB"]


def block_scale_shape(weight_shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the scales that belong to a weight `[O, I]`: `[ceil(O / 128), ceil(I / 128)]`.

    Raises:
        InputError: the weight is not a matrix.
    """
    if len(weight_shape) != 2:
        raise InputError(f"a block-scaled fp8 weight is a matrix [O, I]; this one has the shape {list(weight_shape)}.")
    rows, columns = (-(-size // FP8_BLOCK) for size in weight_shape)
    return rows, columns


@accelerated("quant_triton")
@torch.no_grad()
def quantize_block_fp8(weight: Float[Tensor, "*E O I"]) -> BlockFp8:
    """Divide every 128 x 128 block by `max |block| / 448`, in fp32, and round once to e4m3.

    A block of zeros has the scale 1. Whether a block holds NaN or infinity shows in its values. Has no gradient.
    """
    *experts, rows, columns = weight.shape
    row_blocks, column_blocks = -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
    padding = (0, column_blocks * FP8_BLOCK - columns, 0, row_blocks * FP8_BLOCK - rows)
    blocks = F.pad(weight.float(), padding).view(*experts, row_blocks, FP8_BLOCK, column_blocks, FP8_BLOCK)
    scales = _scale_of(blocks.abs().amax(dim=(-3, -1)))
    values = _rounded(blocks / scales[..., :, None, :, None]).flatten(-2).flatten(-3, -2)
    return BlockFp8(values[..., :rows, :columns].contiguous(), scales)


@accelerated("quant_triton")
@torch.no_grad()
def quantize_activations(x: Float[Tensor, "T I"]) -> ActivationFp8:
    """Divide every 128 channels of a token by `max |x| / 448`, in fp32, and round once to e4m3.

    The last tile of a token may be smaller; one of zeros has the scale 1. Has no gradient.
    """
    columns = x.shape[1]
    blocks = -(-columns // FP8_BLOCK)
    tiles = F.pad(x.float(), (0, blocks * FP8_BLOCK - columns)).view(-1, blocks, FP8_BLOCK)
    scales = _scale_of(tiles.abs().amax(dim=-1))
    return ActivationFp8(_rounded(tiles / scales[..., None]).flatten(1)[:, :columns].contiguous(), scales)


def dequantize_activations(values: Float8e4m3fn[Tensor, "T I"], scales: Float[Tensor, "T IB"]) -> Float[Tensor, "T I"]:
    """What `quantize_activations` kept of its input, in fp32."""
    return values.float() * scales.repeat_interleave(FP8_BLOCK, dim=1)[:, : values.shape[1]]


@accelerated("quant_triton")
def dequantize_block_fp8(
    weight: Float8e4m3fn[Tensor, "O I"], scale_inv: Float[Tensor, "OB IB"], dtype: torch.dtype
) -> Float[Tensor, "O I"]:
    """Multiply every 128 x 128 block by its scale, in fp32, and round once to `dtype`.

    The stored scale is the factor itself; "inv" in its name says that it inverts the quantisation.

    Args:
        weight: e4m3 values; neither size has to be a multiple of 128.
        scale_inv: one scale per block, `OB = ceil(O / 128)`, `IB = ceil(I / 128)`, in any floating dtype.
        dtype: of the result.

    Raises:
        InputError: `weight` is not e4m3, or `scale_inv` has another shape than its blocks ask for.
    """
    check_scales(weight, scale_inv)
    rows, columns = weight.shape
    by_column = scale_inv.float().repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    values = _e4m3_to_float(weight.contiguous())
    whole_blocks = rows // FP8_BLOCK
    split = whole_blocks * FP8_BLOCK
    values[:split].view(whole_blocks, FP8_BLOCK, columns).mul_(by_column[:whole_blocks].unsqueeze(1))
    values[split:].mul_(by_column[whole_blocks:])
    return values.to(dtype)


def check_scales(weight: Tensor, scale_inv: Tensor) -> None:
    """That a weight is e4m3 and its scales have the shape that its blocks ask for.

    Raises:
        InputError: otherwise.
    """
    if weight.dtype != torch.float8_e4m3fn:
        raise InputError(
            f"weight must be torch.float8_e4m3fn, not {weight.dtype}; only such weights carry block scales."
        )
    wanted = block_scale_shape(tuple(weight.shape))
    if tuple(scale_inv.shape) != wanted:
        raise InputError(
            f"scale_inv has the shape {list(scale_inv.shape)}; a weight {list(weight.shape)} needs {list(wanted)}, "
            f"one scale per {FP8_BLOCK} x {FP8_BLOCK} block."
        )


def _scale_of(largest: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    scales = largest / torch.full_like(largest, FP8_LARGEST)  # by a number CUDA would multiply with its inverse
    return torch.where(scales == 0, 1.0, scales)


def _rounded(scaled: Float[Tensor, "*B"]) -> Float8e4m3fn[Tensor, "*B"]:
    """To the nearest e4m3; division may exceed the largest by a rounding error, which not every cast forgives."""
    return scaled.clamp(-FP8_LARGEST, FP8_LARGEST).to(torch.float8_e4m3fn)


def _e4m3_to_float(weight: Float8e4m3fn[Tensor, "O I"]) -> Float[Tensor, "O I"]:
    """The values in fp32; on the CPU several times faster than torch's own cast, which takes them one by one."""
    codes = weight.view(torch.int8)
    if weight.device.type != "cpu" or weight.numel() == 0 or codes.bitwise_and(0x7F).amax() == _NAN_CODE:
        return weight.float()
    # Shifted into place, sign, exponent and mantissa are those of a float16 whose exponent bias is larger by 8.
    halves = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return halves.float().mul_(2.0**8)

"""Block-scaled fp8 weights: what the published FP8 checkpoints store, made into ordinary weights."""

import torch
from jaxtyping import Float, Float8e4m3fn
from torch import Tensor

from qwen3_next.errors import InputError

FP8_BLOCK = 128
"""Rows and columns of a weight that share one scale; the last block of a row or column may be smaller."""

_NAN_CODE = 0x7F


def block_scale_shape(weight_shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the scales that belong to a weight `[O, I]`: `[ceil(O / 128), ceil(I / 128)]`.

    Raises:
        InputError: the weight is not a matrix.
    """
    if len(weight_shape) != 2:
        raise InputError(f"a block-scaled fp8 weight is a matrix [O, I]; this one has the shape {list(weight_shape)}.")
    rows, columns = (-(-size // FP8_BLOCK) for size in weight_shape)
    return rows, columns


def dequantize_block_fp8(
    weight: Float8e4m3fn[Tensor, "O I"], scale_inv: Float[Tensor, "OB IB"], dtype: torch.dtype
) -> Float[Tensor, "O I"]:
    """Multiply every 128 x 128 block by its scale, in fp32, and round once to `dtype`.

    The stored scale is the factor itself; "inv" in its name says that it inverts the quantisation. (DeepSeek-AI 2024,
    arXiv:2412.19437, section 3.3.2: fine-grained quantisation with a 128 x 128 block per weight scale.)

    Args:
        weight: e4m3 values; neither size has to be a multiple of 128.
        scale_inv: one scale per block, `OB = ceil(O / 128)`, `IB = ceil(I / 128)`, in any floating dtype.
        dtype: of the result.

    Raises:
        InputError: `weight` is not e4m3, or `scale_inv` has another shape than its blocks ask for.
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
    rows, columns = weight.shape
    by_column = scale_inv.float().repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    values = _e4m3_to_float(weight.contiguous())
    whole_blocks = rows // FP8_BLOCK
    split = whole_blocks * FP8_BLOCK
    values[:split].view(whole_blocks, FP8_BLOCK, columns).mul_(by_column[:whole_blocks].unsqueeze(1))
    values[split:].mul_(by_column[whole_blocks:])
    return values.to(dtype)


def _e4m3_to_float(weight: Float8e4m3fn[Tensor, "O I"]) -> Float[Tensor, "O I"]:
    """The values in fp32; on the CPU several times faster than torch's own cast, which takes them one by one."""
    codes = weight.view(torch.int8)
    if weight.device.type != "cpu" or weight.numel() == 0 or codes.bitwise_and(0x7F).amax() == _NAN_CODE:
        return weight.float()
    # Shifted into place, sign, exponent and mantissa are those of a float16 whose exponent bias is larger by 8.
    halves = codes.to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return halves.float().mul_(2.0**8)

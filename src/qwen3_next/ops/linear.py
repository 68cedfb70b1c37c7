"""The linear layer, with ordinary and with block-scaled fp8 weights."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qwen3_next.errors import InputError
from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.quant import block_scale_shape, dequantize_activations, dequantize_block_fp8, quantize_activations


@accelerated("linear_triton")
def linear(
    x: Float[Tensor, "*B I"],
    weight: Float[Tensor, "O I"],
    scale_inv: Float[Tensor, "OB IB"] | None = None,
    bias: Float[Tensor, "O"] | None = None,
) -> Float[Tensor, "*B O"]:
    """`weight x + bias` for every row of `x`, in the dtype of `x`.

    With fp8 weights the rows are quantised as well, each on its own and however many there are, so that a token's
    result does not depend on its company: 128 channels share a scale, and the product of what the rounding kept with
    the dequantised weights is summed in fp32. (DeepSeek-AI 2024, arXiv:2412.19437, section 3.3.)

    Args:
        weight: in the dtype of `x`, or e4m3.
        scale_inv: of an e4m3 weight the scales of its blocks, see `dequantize_block_fp8`; else None.

    Raises:
        InputError: `scale_inv` is missing, superfluous or of another shape than the weight's blocks; a gradient
            through fp8 weights is asked for.
    """
    check_weight(x, weight, scale_inv)
    if scale_inv is None:
        return F.linear(x, weight, bias)
    rows = dequantize_activations(*quantize_activations(x.reshape(-1, x.shape[-1])))
    outputs = rows @ dequantize_block_fp8(weight, scale_inv, torch.float32).t()
    outputs = outputs if bias is None else outputs + bias.float()
    return outputs.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def check_weight(x: Tensor, weight: Tensor, scale_inv: Tensor | None) -> None:
    """That a weight comes with scales exactly where it is e4m3, and that no gradient has to pass it then.

    Raises:
        InputError: otherwise.
    """
    if scale_inv is None:
        if weight.dtype == torch.float8_e4m3fn:
            raise InputError("an e4m3 weight needs scale_inv, one scale per 128 x 128 block.")
        return
    if weight.dtype != torch.float8_e4m3fn:
        raise InputError(f"scale_inv belongs to a weight of torch.float8_e4m3fn, not {weight.dtype}; leave it out.")
    wanted = block_scale_shape(tuple(weight.shape))
    if tuple(scale_inv.shape) != wanted:
        raise InputError(
            f"scale_inv has the shape {list(scale_inv.shape)}; a weight {list(weight.shape)} needs {list(wanted)}."
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise InputError(
            "fp8 weights are for inference: x asks for a gradient; call under torch.no_grad(), or dequantise the "
            "weights (dequantize_block_fp8) to train."
        )

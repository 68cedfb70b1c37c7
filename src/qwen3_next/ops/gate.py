"""Products with a gate: the sigmoid gate after attention, and SwiGLU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.backend import accelerated


@accelerated("gate_triton")
def sigmoid_gate(x: Float[Tensor, "T H Dh"], gate: Float[Tensor, "T H Dh"]) -> Float[Tensor, "T H Dh"]:
    """`x * sigmoid(gate)`, the sigmoid rounded to the dtype of `gate` before the product.

    (Qiu et al. 2025, arXiv:2505.06708, eq. 5: the gate on the output of attention.)
    """
    return x * torch.sigmoid(gate)


@accelerated("gate_triton")
def swiglu(gate: Float[Tensor, "*B F"], up: Float[Tensor, "*B F"]) -> Float[Tensor, "*B F"]:
    """`silu(gate) * up` with `silu(a) = a sigmoid(a)`, which is rounded to the dtype of `gate` before the product.

    (Shazeer 2020, arXiv:2002.05202, eq. 5, without the products around it.)
    """
    return F.silu(gate) * up

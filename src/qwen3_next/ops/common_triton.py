"""What the Triton kernels share: products that also run in Triton's interpreter, and facts of the card."""
# pyright: basic

from functools import cache

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run on the CPU, in Triton's interpreter; it multiplies bf16 bit patterns as if they were integers."""


@triton.jit
def dot(a, b, acc=None):
    """`a @ b + acc` in fp32 on the tensor cores; fp32 operands as three TF32 products, which keep 1e-6."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="tf32x3")


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; a small number in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device runs kernels that are written for the tensor cores of H100 and H200."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)

"""The gated delta rule in chunks on the GPU: the twins of gated_delta.py."""
# pyright: basic

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.gated_delta import GatedDeltaOutput
from qwen3_next.ops.gated_delta_chunk_triton import Course, scan_chunks, solve_chunks, walk
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

_WIDEST = 256
"""Above it, a block of the state no longer fits into the registers."""


def _unfit(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if v.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v in one of bf16, fp16 and fp32, not in {q.dtype}, {k.dtype} and {v.dtype}"
    if max(k.shape[2], v.shape[2]) > _WIDEST:
        return f"heads of up to {_WIDEST} channels, not of {k.shape[2]} and {v.shape[2]}"
    return None


def _refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    segments: Segments,
    initial_state: Tensor | None = None,
) -> str | None:
    inputs = (q, k, v, log_decay, beta, initial_state)
    if q.is_cuda and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        # Triton 3.6 compiles some of the gradient's products on Hopper so that they read beyond their shared memory.
        return "calls without gradients, until those of the kernels agree with the definition's on every card"
    return _unfit(q, k, v)


def _slots_refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    segments: Segments,
    states: Tensor,
    slots: Tensor,
    snapshots: Snapshots | None = None,
) -> str | None:
    if not states[:1].is_contiguous():
        return f"states that are contiguous within a slot, not with strides {states.stride()}"
    return _unfit(q, k, v)


@refuses(_refusal)
def gated_delta_rule(
    q: Float[Tensor, "T Hk Dk"],
    k: Float[Tensor, "T Hk Dk"],
    v: Float[Tensor, "T Hv Dv"],
    log_decay: Float[Tensor, "T Hv"],
    beta: Float[Tensor, "T Hv"],
    segments: Segments,
    initial_state: Float[Tensor, "N Hv Dk Dv"] | None = None,
) -> GatedDeltaOutput:
    """Twin of `gated_delta.gated_delta_rule`: matrix products in the dtype of v, sums and states in fp32."""
    inputs = (q, k, v, log_decay, beta, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return GatedDeltaOutput(*_GatedDeltaRule.apply(*inputs, segments))
    result = scan_chunks(q, k, v, beta, solve_chunks(q, k, log_decay, beta, segments), segments, initial_state)
    return GatedDeltaOutput(result.output, result.final_state)


@refuses(_slots_refusal)
@torch.no_grad()
def gated_delta_rule_(
    q: Float[Tensor, "T Hk Dk"],
    k: Float[Tensor, "T Hk Dk"],
    v: Float[Tensor, "T Hv Dv"],
    log_decay: Float[Tensor, "T Hv"],
    beta: Float[Tensor, "T Hv"],
    segments: Segments,
    states: Float[Tensor, "M Hv Dk Dv"],
    slots: Int[Tensor, "N"],
    snapshots: Snapshots | None = None,
) -> Float[Tensor, "T Hv Dv"]:
    """Twin of `gated_delta.gated_delta_rule_`: the states are read from their slots and written there, never copied."""
    course = Course.through_slots(segments, states, slots, snapshots)
    return walk(q, k, v, solve_chunks(q, k, log_decay, beta, course.parts), course)


class _GatedDeltaRule(torch.autograd.Function):
    """Keeps the inputs alone: the systems and the states between chunks are found again when a gradient is wanted."""

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, initial_state, segments: Segments):
        ctx.save_for_backward(q, k, v, log_decay, beta, initial_state)
        ctx.segments = segments
        ctx.set_materialize_grads(False)
        systems = solve_chunks(q, k, log_decay, beta, segments)
        result = scan_chunks(q, k, v, beta, systems, segments, initial_state)
        return result.output, result.final_state

    @staticmethod
    def backward(ctx, grad_output, grad_final_state):
        from qwen3_next.ops.gated_delta_grad_triton import gated_delta_backward

        q, k, v, log_decay, beta, initial_state = ctx.saved_tensors
        grads = gated_delta_backward(
            q, k, v, log_decay, beta, ctx.segments, initial_state, grad_output, grad_final_state, None
        )
        return *grads, None

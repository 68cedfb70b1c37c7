"""The gated delta rule in chunks on the GPU: the twins of gated_delta.py."""
# pyright: basic

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.gated_delta import GatedDeltaOutput
from qwen3_next.ops.gated_delta_chunk_triton import ChunkSystems, Course, scan_chunks, solve_chunks, walk
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

_WIDEST = 256
"""Above it, a block of the state no longer fits into the registers."""

_WIDTHS_WITH_GRADIENT = {64, 128}
"""On a GPU, where each pair of them was compared with the definition."""


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
        # What was found right on a card. Triton 3.6 compiles a walk wrongly whose rows it cannot fetch 16 bytes at a
        # time, and was seen to compile fp32 products of narrow heads and those of 256 channels wrongly.
        if v.dtype not in (torch.bfloat16, torch.float16):
            return f"gradients in bf16 and fp16, not in {v.dtype}"
        if not {k.shape[2], v.shape[2]} <= _WIDTHS_WITH_GRADIENT:
            allowed = " and ".join(map(str, sorted(_WIDTHS_WITH_GRADIENT)))
            return f"gradients of heads of {allowed} channels, not of {k.shape[2]} and {v.shape[2]}"
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
    """Keeps the inputs and the systems; the states between chunks are found again when a gradient is wanted.

    The systems of a head take as many bytes as its values of 128 channels, the states four times as many.
    """

    @staticmethod
    def forward(ctx, q, k, v, log_decay, beta, initial_state, segments: Segments):
        systems = solve_chunks(q, k, log_decay, beta, segments)
        result = scan_chunks(q, k, v, beta, systems, segments, initial_state)
        ctx.save_for_backward(q, k, v, log_decay, beta, initial_state, *systems)
        ctx.segments = segments
        ctx.set_materialize_grads(False)
        return result.output, result.final_state

    @staticmethod
    def backward(ctx, grad_output, grad_final_state):
        from qwen3_next.ops.gated_delta_grad_triton import gated_delta_backward

        q, k, v, log_decay, beta, initial_state, *systems = ctx.saved_tensors
        grads = gated_delta_backward(
            *(q, k, v, log_decay, beta, ctx.segments, initial_state, grad_output, grad_final_state),
            ChunkSystems(*systems),
        )
        return *grads, None

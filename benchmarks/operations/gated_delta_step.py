"""Steps of a DeltaNet layer: one token of each sequence, and the verification of drafts."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.operations.case import Case, Inputs
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.causal_conv import ProjectionColumns
from qwen3_next.ops.gated_delta_step import StepState, StepWeights, delta_net_step_
from qwen3_next.ops.segments import Segments

COLUMNS = ProjectionColumns(key_heads=16, value_heads=32, key_width=128, value_width=128)
CHANNELS, PROJECTED, STATE_BYTES = 8_192, 12_288, 32 * 128 * 128 * 4
ACCEPTED = 2


def cases() -> Iterator[Case]:
    """Convolution, norms, gates, rule and gated norm in one; the floor is that of the fp32 states alone."""
    for count, quoted in ((1, 3.6), (16, 26.7), (64, 94.5), (256, 364.0)):
        for tokens in (1, 3):
            yield Case(
                operation="delta net step" if tokens == 1 else "delta net step with 2 drafts",
                shape=f"B={count}" if tokens == 1 else f"B={count}, {ACCEPTED} of 3 accepted before",
                make=lambda count=count, tokens=tokens: _inputs(count, tokens),
                ours=_step,
                definition=_definition,
                read_bytes=count * STATE_BYTES,
                written_bytes=count * STATE_BYTES,
                tolerance=1e-2,
                quoted=("flash-linear-attention, the rule alone", quoted) if tokens == 1 else None,
                goal=1.15 if tokens == 1 and count >= 16 else None,
                graph=True,
            )


def _inputs(count: int, tokens: int) -> Inputs:
    """Also a copy of the state, since the call changes the other."""
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    heads = [torch.randn(32, device="cuda") for _ in range(2)]
    conv, norm = torch.randn(CHANNELS, 4, **options), torch.ones(128, **options)
    weights = StepWeights(conv, *heads, norm, 1e-6, COLUMNS)
    state = StepState.allocate(count, weights, 3 if tokens > 1 else 0, torch.bfloat16)
    for tensor in (state.recurrent, state.conv, state.pending_qkv, state.pending_ba):
        tensor.normal_()
    accepted = None if tokens == 1 else torch.full((count,), ACCEPTED, device="cuda")
    qkvz, ba = (torch.randn(count * tokens, width, **options) for width in (PROJECTED, 64))
    slots = torch.arange(count, device="cuda", dtype=torch.int32)
    return qkvz, ba, weights, state, slots, Segments.uniform(count, tokens, "cuda"), accepted, _copy(state)


def _copy(state: StepState) -> StepState:
    fields = {field.name: getattr(state, field.name).clone() for field in dataclasses.fields(state)}
    return dataclasses.replace(state, **fields)


def _step(*inputs: Any) -> Tensor:
    return delta_net_step_(*inputs[:-1])


def _definition(qkvz: Tensor, ba: Tensor, weights: StepWeights, *rest: Any) -> Tensor:
    """In fp32, from the untouched copy of the state."""
    _, slots, segments, accepted, state = rest
    wide = dataclasses.replace(weights, conv=weights.conv.float(), norm=weights.norm.float())
    state = dataclasses.replace(
        state,
        recurrent=state.recurrent.clone(),
        conv=state.conv.float(),
        pending_qkv=state.pending_qkv.float(),
        pending_ba=state.pending_ba.float(),
    )
    with use("reference"):
        return delta_net_step_(qkvz.float(), ba.float(), wide, state, slots, segments, accepted)

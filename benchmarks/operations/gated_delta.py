"""The gated delta rule over whole prompts, forward and with its gradients."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from benchmarks.operations.case import Case, Inputs, Run
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.gated_delta import gated_delta_rule
from qwen3_next.ops.segments import Segments

KEY_HEADS, VALUE_HEADS, WIDTH = 16, 32, 128
VALUES_PER_TOKEN = (2 * KEY_HEADS + VALUE_HEADS) * WIDTH
STATE_BYTES = VALUE_HEADS * WIDTH * WIDTH * 4


def cases() -> Iterator[Case]:
    """One sequence of each length of the targets, and the training step's share."""
    for tokens, quoted in ((4_096, 450.0), (32_768, 848.0), (131_072, 2_760.0)):
        yield Case(
            operation="gated delta rule",
            shape=f"T={tokens:,}",
            make=lambda tokens=tokens: _inputs(tokens),
            ours=_forward,
            definition=_definition(_forward),
            timed_definition=_definition(_forward) if tokens == 4_096 else None,
            peers={"flash-linear-attention": _peer()},
            read_bytes=tokens * (2 * VALUES_PER_TOKEN + 8 * VALUE_HEADS) + STATE_BYTES,
            written_bytes=tokens * 2 * VALUE_HEADS * WIDTH + STATE_BYTES,
            tolerance=1e-2,
            quoted=("FlashQLA", quoted),
        )
    tokens, peer = 32_768, _peer()
    yield Case(
        operation="gated delta rule with gradients",
        shape=f"T={tokens:,}",
        make=lambda: _inputs(tokens),
        ours=_with_gradients(_forward),
        definition=_definition(_with_gradients(_forward)),
        peers={"flash-linear-attention": None if peer is None else _with_gradients(peer)},
        # Forward, then everything again and the gradient of the output, for one gradient of each input.
        read_bytes=tokens * (4 * VALUES_PER_TOKEN + 2 * VALUE_HEADS * WIDTH + 16 * VALUE_HEADS) + 2 * STATE_BYTES,
        written_bytes=tokens * (2 * VALUES_PER_TOKEN + 2 * VALUE_HEADS * WIDTH + 8 * VALUE_HEADS) + 2 * STATE_BYTES,
        tolerance=2e-2,
        quoted=("FlashQLA", 3_563.0),
    )


def _inputs(tokens: int) -> Inputs:
    keys, values = KEY_HEADS * WIDTH, VALUE_HEADS * WIDTH
    row = torch.randn(tokens, 2 * keys + values, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.unflatten(1, (-1, WIDTH)) for x in row.split([keys, keys, values], dim=1))
    log_decay = -2 * torch.rand(tokens, VALUE_HEADS, device="cuda") ** 3
    beta = torch.rand(tokens, VALUE_HEADS, device="cuda")
    state = torch.randn(1, VALUE_HEADS, WIDTH, WIDTH, device="cuda")
    return q, k, v, log_decay, beta, Segments.from_lengths([tokens], "cuda"), state


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    return tuple(gated_delta_rule(*inputs))


def _definition(run: Run) -> Run:
    def defined(*inputs: Any) -> tuple[Tensor, ...]:
        with use("reference"):
            return run(*inputs)

    return defined


def _with_gradients(forward: Callable[..., Any]) -> Run:
    """The gradients of q, k, v, log_decay and beta, where every output has the gradient 1 / 64."""

    def run(*inputs: Any) -> tuple[Tensor, ...]:
        tensors = [x.detach().requires_grad_() for x in inputs[:5]]
        output = forward(*tensors, *inputs[5:])[0]
        return torch.autograd.grad(output, tensors, torch.full_like(output, 1 / 64))

    return run


def _peer() -> Run | None:
    if find_spec("fla") is None:
        return None
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, segments: Segments, state: Tensor) -> Any:
        fields = [x[None] for x in (q, k, v, decay, beta)]
        return chunk_gated_delta_rule(
            *fields,
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=segments.cu_seqlens,
        )

    return run

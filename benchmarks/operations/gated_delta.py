"""The gated delta rule over whole prompts, forward and with its gradients."""

from collections.abc import Callable, Iterator, Sequence
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
    """One sequence of each length of the targets, and training steps."""
    for tokens, quoted in ((4_096, 450.0), (32_768, 848.0), (131_072, 2_760.0)):
        yield Case(
            operation="gated delta rule",
            shape=f"T={tokens:,}",
            make=lambda tokens=tokens: _inputs([tokens], KEY_HEADS),
            ours=_forward,
            definition=_definition(_forward),
            timed_definition=_definition(_forward) if tokens == 4_096 else None,
            peers={"flash-linear-attention": _peer()},
            read_bytes=tokens * (2 * VALUES_PER_TOKEN + 8 * VALUE_HEADS) + STATE_BYTES,
            written_bytes=tokens * 2 * VALUE_HEADS * WIDTH + STATE_BYTES,
            tolerance=1e-2,
            quoted=("FlashQLA", quoted),
        )
    # Of one sequence with the published heads, and of a training step of the shipped model: packed documents.
    yield from map(
        _gradients_case, (("T=4,096", [4_096], 16), ("T=32,768", [32_768], 16), ("98 x 1,003", [1_003] * 98, 1))
    )


def _gradients_case(row: tuple[str, list[int], int]) -> Case:
    shape, lengths, key_heads = row
    tokens, peer = sum(lengths), _peer()
    scale = key_heads / KEY_HEADS
    values, heads = VALUES_PER_TOKEN * scale, VALUE_HEADS * scale
    states = 2 * len(lengths) * STATE_BYTES * scale
    return Case(
        operation="gated delta rule with gradients",
        shape=shape,
        make=lambda: _inputs(lengths, key_heads),
        ours=_with_gradients(_forward),
        definition=_definition(_with_gradients(_forward)),
        timed_definition=_definition(_with_gradients(_forward)) if tokens != 32_768 else None,
        peers={"flash-linear-attention": None if peer is None else _with_gradients(peer)},
        # Forward, then everything again and the gradient of the output, for one gradient of each input.
        read_bytes=tokens * (4 * values + 2 * heads * WIDTH + 16 * heads) + states,
        written_bytes=tokens * (2 * values + 2 * heads * WIDTH + 8 * heads) + states,
        tolerance=2e-2,
        quoted=("FlashQLA", 3_563.0) if tokens == 32_768 else None,
    )


def _inputs(lengths: Sequence[int], key_heads: int) -> Inputs:
    tokens, value_heads = sum(lengths), key_heads * VALUE_HEADS // KEY_HEADS
    keys, values = key_heads * WIDTH, value_heads * WIDTH
    row = torch.randn(tokens, 2 * keys + values, device="cuda", dtype=torch.bfloat16)
    q, k, v = (x.unflatten(1, (-1, WIDTH)) for x in row.split([keys, keys, values], dim=1))
    log_decay = -2 * torch.rand(tokens, value_heads, device="cuda") ** 3
    beta = torch.rand(tokens, value_heads, device="cuda")
    state = torch.randn(len(lengths), value_heads, WIDTH, WIDTH, device="cuda")
    return q, k, v, log_decay, beta, Segments.from_lengths(lengths, "cuda"), state


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

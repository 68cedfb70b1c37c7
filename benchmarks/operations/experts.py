"""Routing and the experts of a layer, the shared one among them."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.operations.case import Case, Inputs, Run
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.experts import ExpertScales, SharedExpert, swiglu_experts
from qwen3_next.ops.routing import route

EXPERTS, TOP_K, HIDDEN, WIDTH = 512, 10, 2_048, 512
QUOTED = {1: 320.0, 4: 337.0, 16: 560.0, 64: 1_046.0, 256: 1_340.0, 4_096: 2_222.0, 16_384: 6_256.0, 32_768: 11_121.0}
"""torch's grouped_mm on an H200, microseconds."""

Weights = tuple[Tensor, Tensor, ExpertScales | None, SharedExpert]


def cases() -> Iterator[Case]:
    """The shapes of Qwen3-Next-80B-A3B, every token with ten experts at random and the shared one."""
    for tokens in (1, 16, 32_768):
        yield Case(
            operation="routing",
            shape=f"T={tokens:,}",
            make=lambda tokens=tokens: (_normal(tokens, HIDDEN), _normal(EXPERTS, HIDDEN) / HIDDEN**0.5, TOP_K, True),
            ours=_weights_of_the_best,
            definition=_definition(_weights_of_the_best),
            timed_definition=_definition(_weights_of_the_best),
            read_bytes=2 * HIDDEN * (tokens + EXPERTS),
            written_bytes=tokens * (6 * EXPERTS + 10 * TOP_K),
            flops=2 * tokens * HIDDEN * EXPERTS,
            tolerance=1e-2,
            graph=tokens <= 16,
        )
    for fp8 in (False, True):
        kept: dict[str, Weights] = {}
        for tokens in QUOTED:
            yield Case(
                operation="experts, " + ("fp8" if fp8 else "bf16"),
                shape=f"{tokens:,} token{'s' if tokens > 1 else ''}",
                make=lambda tokens=tokens, fp8=fp8, kept=kept: _inputs(tokens, fp8, kept),
                ours=swiglu_experts,
                definition=_definition(swiglu_experts),
                peers={} if fp8 else {"torch grouped_mm": _grouped_mm},
                read_bytes=_distinct(tokens) * 3 * HIDDEN * WIDTH * (1 if fp8 else 2) + 2 * tokens * HIDDEN,
                written_bytes=2 * tokens * HIDDEN,
                flops=6 * tokens * (TOP_K + 1) * HIDDEN * WIDTH,
                rate="fp8" if fp8 else "bf16",
                tolerance=2e-2 if fp8 else 1e-2,
                quoted=None if fp8 else ("grouped_mm", QUOTED[tokens]),
                goal=1.5 if tokens <= 4 or tokens >= 4_096 else 1.2,
                graph=tokens <= 256,
            )
    yield Case(
        operation="experts with gradients, bf16",
        shape="8,192 tokens",
        make=lambda: _inputs(8_192, False, {})[:5],
        ours=_with_gradients,
        definition=_definition(_with_gradients),
        peers={"torch grouped_mm": _grouped_mm_with_gradients},
        # Weights read twice, their gradients written.
        read_bytes=EXPERTS * 6 * HIDDEN * WIDTH * 2,
        written_bytes=EXPERTS * 3 * HIDDEN * WIDTH * 2,
        flops=18 * 8_192 * TOP_K * HIDDEN * WIDTH,
        tolerance=2e-2,
    )


def _distinct(tokens: int) -> float:
    """Experts that at least one of the tokens is expected to choose, and the shared one."""
    return EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens) + 1


def _inputs(tokens: int, fp8: bool, kept: dict[str, Weights]) -> Inputs:
    """The weights are larger than any cache: fresh routing is enough."""
    if "weights" not in kept:
        kept["weights"] = _fp8_weights() if fp8 else _bf16_weights()
    gate_up, down, scales, shared = kept["weights"]
    weights, experts = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP_K)
    weights = (weights / weights.sum(dim=1, keepdim=True)).bfloat16()
    return _normal(tokens, HIDDEN), gate_up, down, weights, experts, scales, shared


def _bf16_weights() -> Weights:
    own = (_normal(*shape) / HIDDEN**0.5 for shape in ((WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH), (1, HIDDEN)))
    gate_up = _normal(EXPERTS, 2 * WIDTH, HIDDEN).div_(HIDDEN**0.5)
    return gate_up, _normal(EXPERTS, HIDDEN, WIDTH).div_(WIDTH**0.5), None, SharedExpert(*own)


def _fp8_weights() -> Weights:
    gate_up, down, _, shared = _bf16_weights()
    scales = ExpertScales(_scales(EXPERTS, 2 * WIDTH, HIDDEN), _scales(EXPERTS, HIDDEN, WIDTH))
    own = tuple(_scales(*w.shape) for w in shared[:3])
    shared = SharedExpert(*(_e4m3(w) for w in shared[:3]), shared.share, (own[0], own[1], own[2]))
    return _e4m3(gate_up), _e4m3(down), scales, shared


def _e4m3(weight: Tensor) -> Tensor:
    """In numbers that e4m3 has; the scales undo the factor."""
    return (weight * 64).to(torch.float8_e4m3fn)


def _scales(*shape: int) -> Tensor:
    return (torch.rand(*shape[:-2], shape[-2] // 128, shape[-1] // 128, device="cuda") / 8 + 1) / 64


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _weights_of_the_best(*inputs: Any) -> Tensor:
    """Sorted: of equal scores either may come first."""
    return route(*inputs).weights.sort(dim=1).values


def _with_gradients(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return _differentiated(swiglu_experts, x, *others)


def _grouped_mm_with_gradients(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    return _differentiated(_grouped_mm, x, *others)


def _differentiated(run: Run, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    output = run(*leaves, inputs[4])
    return torch.autograd.grad(output, leaves, torch.full_like(output, 1 / 64))


def _grouped_mm(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    experts: Tensor,
    scales: None = None,
    shared: SharedExpert | None = None,
) -> Tensor:
    by_expert, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(EXPERTS, device=x.device)
    borders = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)
    gate, up = F.grouped_mm(x[order // TOP_K], gate_up_proj.mT, offs=borders).chunk(2, dim=-1)
    rows = F.grouped_mm(F.silu(gate) * up, down_proj.mT, offs=borders)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    update = (rows[inverse].view(len(x), TOP_K, -1) * weights[..., None]).sum(dim=1)
    if shared is None:
        return update
    hidden = F.silu(x @ shared.gate_proj.t()) * (x @ shared.up_proj.t())
    return update + torch.sigmoid(x @ shared.share.t()) * (hidden @ shared.down_proj.t())


def _definition(run: Run) -> Run:
    def defined(*inputs: Any) -> Any:
        with use("reference"):
            return run(*inputs)

    return defined

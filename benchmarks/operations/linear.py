"""Linear layers of a few tokens, where the weight's bytes count, and of many, where products do."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.operations.case import Case, Inputs, Run
from torch import Tensor

from qwen3_next.ops.backend import use
from qwen3_next.ops.linear import linear
from qwen3_next.ops.quant import quantize_activations

LAYERS = {
    "in_proj_qkvz": (12_288, 2_048),
    "q_proj": (8_192, 2_048),
    "out_proj": (2_048, 4_096),
    "lm_head": (151_936, 2_048),
}


def cases() -> Iterator[Case]:
    """The large projections of Qwen3-Next-80B-A3B; the head meets few tokens only."""
    for fp8 in (False, True):
        for name, (rows, columns) in LAYERS.items():
            for tokens in (1, 4, 16, 64, 4_096, 32_768):
                if tokens > 64 and (not fp8 or name == "lm_head"):
                    continue  # ordinary weights then meet cuBLAS itself
                yield Case(
                    operation="linear, " + ("fp8" if fp8 else "bf16"),
                    shape=f"{name}, {tokens:,} token{'s' if tokens > 1 else ''}",
                    make=lambda tokens=tokens, rows=rows, columns=columns, fp8=fp8: _inputs(tokens, rows, columns, fp8),
                    ours=_ours,
                    definition=_definition(_ours),
                    peers={"cuBLAS, bf16": _cublas},
                    read_bytes=rows * columns * (1 if fp8 else 2) + 2 * tokens * columns,
                    written_bytes=2 * tokens * rows,
                    flops=2 * tokens * rows * columns,
                    rate="fp8" if fp8 else "bf16",
                    tolerance=1e-2,
                    quoted=("cuBLAS", 28.0) if name == "in_proj_qkvz" and tokens <= 16 and not fp8 else None,
                    goal=1.4 if tokens <= 16 else None,
                    graph=tokens <= 64,
                )
    tokens, columns = 32_768, 2_048
    yield Case(
        operation="activations to fp8",
        shape=f"T={tokens:,}, {columns:,} columns",
        make=lambda: (_normal(tokens, columns),),
        ours=_given_back(quantize_activations),
        definition=_definition(_given_back(quantize_activations)),
        timed_definition=_definition(quantize_activations),
        read_bytes=2 * tokens * columns,
        written_bytes=tokens * columns * (1 + 4 / 128),
        tolerance=1e-2,
        goal=1.3,
    )


def _inputs(tokens: int, rows: int, columns: int, fp8: bool) -> Inputs:
    """The bf16 weight comes last, for the peer."""
    x, plain = _normal(tokens, columns), _normal(rows, columns) / columns**0.5
    if not fp8:
        return x, plain, None, plain
    scales = (torch.rand(rows // 128, columns // 128, device="cuda") / 8 + 1) / 64
    return x, (plain * 64).to(torch.float8_e4m3fn), scales, plain


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _ours(x: Tensor, weight: Tensor, scales: Tensor | None, plain: Tensor) -> Tensor:
    return linear(x, weight, scales)


def _cublas(x: Tensor, weight: Tensor, scales: Tensor | None, plain: Tensor) -> Tensor:
    return F.linear(x, plain)


def _given_back(run: Run) -> Run:
    def multiplied(x: Tensor) -> Tensor:
        return run(x)[1]

    return multiplied


def _definition(run: Run) -> Run:
    def defined(*inputs: Any) -> Any:
        with use("reference"):
            return run(*inputs)

    return defined

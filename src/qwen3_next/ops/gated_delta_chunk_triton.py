"""The chunked gated delta rule on the GPU: a kernel that solves all chunks at once, and one that walks over them.

docs/gated_delta_rule.md, in its names. Nothing is normalised in memory: 1 / sqrt(|x|^2 + 1e-6) of q and k are scales of
rows of the products. Shapes: G chunks of at most 64 tokens, `L` = 64; rows beyond a chunk's tokens are zero.
"""
# pyright: basic

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.segments import Segments

CHUNK = 64
"""Tokens of a chunk; `segments.cut(CHUNK)` says where each chunk stands."""


class ChunkSystems(NamedTuple):
    """What the chunks of each value head are, independently of any state.

    Attributes:
        inverse: T = (I + tril(beta_i e^(sums_i - sums_j) k_i k_j, -1))^-1 with k normalised, beta not in its columns.
        attention: P = tril(e^(sums_i - sums_j) q_i k_j) with q and k normalised and q divided by sqrt(Dk).
        sums: of log_decay from the first token of the chunk up to and with this token; fp64.
        rstd_q: 1 / sqrt(|q|^2 + 1e-6) / sqrt(Dk).
        rstd_k: 1 / sqrt(|k|^2 + 1e-6).
    """

    inverse: Float[Tensor, "G Hv L L"]
    attention: Float[Tensor, "G Hv L L"]
    sums: Float[Tensor, "T Hv"]
    rstd_q: Float[Tensor, "T Hk"]
    rstd_k: Float[Tensor, "T Hk"]


class ScanResult(NamedTuple):
    """What the walk over the chunks finds.

    Attributes:
        output: in `v.dtype`.
        final_state: fp32.
        states: the state that enters each chunk, in `v.dtype`; None unless asked for.
        written: the values that the tokens write, `beta (v - S^T k)`, in `v.dtype`; None unless asked for.
    """

    output: Float[Tensor, "T Hv Dv"]
    final_state: Float[Tensor, "N Hv Dk Dv"]
    states: Float[Tensor, "G Hv Dk Dv"] | None
    written: Float[Tensor, "T Hv Dv"] | None


def solve_chunks(
    q: Float[Tensor, "T Hk Dk"],
    k: Float[Tensor, "T Hk Dk"],
    log_decay: Float[Tensor, "T Hv"],
    beta: Float[Tensor, "T Hv"],
    segments: Segments,
) -> ChunkSystems:
    """Solve the triangular system of every chunk; matrices in the dtype of q."""
    raise NotImplementedError


def scan_chunks(
    q: Float[Tensor, "T Hk Dk"],
    k: Float[Tensor, "T Hk Dk"],
    v: Float[Tensor, "T Hv Dv"],
    beta: Float[Tensor, "T Hv"],
    systems: ChunkSystems,
    segments: Segments,
    initial_state: Float[Tensor, "N Hv Dk Dv"] | None,
    *,
    store_states: bool = False,
) -> ScanResult:
    """Carry the states through the chunks of their sequences; `store_states` keeps them and what was written."""
    raise NotImplementedError

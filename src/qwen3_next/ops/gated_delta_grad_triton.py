"""The gradient of the chunked gated delta rule on the GPU.

In the names of docs/gated_delta_rule.md, for one chunk of one value head: S enters, S' leaves, a hat marks normalised
rows (q also divided by sqrt(Dk)), A = I + N is the system, P the attention, `left_j` = e^(c_L - c_j), and

    X = diag(beta) (V - diag(gamma) K^ S)    what each token would write alone
    Z = A^-1 X                               what they write
    O = diag(gamma) Q^ S + P Z               S' = gamma_L S + K^^T diag(left) Z.

With a d for gradients, the walk back over the chunks carries dS:

    dZ = P^T dO + diag(left) K^ dS'                                                              (1)
    dX = A^-T dZ                                                                                 (2)
    dS = gamma_L dS' + (diag(gamma) Q^)^T dO - (diag(beta gamma) K^)^T dX.                       (3)

All else follows chunk by chunk, with dP = tril(dO Z^T) and dN = -tril(dX Z^T, -1):

    dV = diag(beta) dX                                                                           (4)
    dQ^ = diag(gamma) dO S^T + (dP * Gamma) K^                                                   (5)
    dK^ = diag(left) Z dS'^T - diag(beta gamma) dX S^T + (dP * Gamma)^T Q^ + (Y + Y^T) K^        (6)
          where Y = diag(beta) (dN * Gamma)
    dbeta_i = dX_i (v_i - gamma_i S^T k^_i) + sum_j (dN * Gamma)_ij k^_i k^_j                    (7)

and the decay of token t, which is in every c_i with i >= t:

    dlog_decay_t = gamma_L <dS', S> + sum_(i >= t) gamma_i (dO_i S^T q^_i - beta_i dX_i S^T k^_i)
                   + sum_(j < t) (left_j Z_j dS'^T k^_j + sum_(i >= t) (dP * P + dN * N)_ij).    (8)

No term of (8) is a small difference of large ones, however strong the decay: what cancels is left out.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# (the four: launches, rounded sizes and loops of kernels, which Triton types as constants or not at all)

from typing import NamedTuple

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from qwen3_next.ops.gated_delta_chunk_triton import (
    CHUNK,
    ChunkSystems,
    by_token,
    padded_width,
    scan_chunks,
    solve_chunks,
)
from qwen3_next.ops.gated_delta_scan_grad_triton import chunk_gradients_kernel, walk_back_kernel
from qwen3_next.ops.segments import Segments


class GatedDeltaGradients(NamedTuple):
    """The gradient of each input, in its dtype."""

    q: Float[Tensor, "T Hk Dk"]
    k: Float[Tensor, "T Hk Dk"]
    v: Float[Tensor, "T Hv Dv"]
    log_decay: Float[Tensor, "T Hv"]
    beta: Float[Tensor, "T Hv"]
    initial_state: Float[Tensor, "N Hv Dk Dv"] | None


def gated_delta_backward(
    q: Float[Tensor, "T Hk Dk"],
    k: Float[Tensor, "T Hk Dk"],
    v: Float[Tensor, "T Hv Dv"],
    log_decay: Float[Tensor, "T Hv"],
    beta: Float[Tensor, "T Hv"],
    segments: Segments,
    initial_state: Float[Tensor, "N Hv Dk Dv"] | None,
    grad_output: Float[Tensor, "T Hv Dv"] | None,
    grad_final_state: Float[Tensor, "N Hv Dk Dv"] | None,
    systems: ChunkSystems | None = None,
) -> GatedDeltaGradients:
    """The gradients of `gated_delta_rule`, given those of its results; None stands for zeros.

    Args:
        systems: those of the forward pass, where it kept them. States and writes are found again in any case.
    """
    if systems is None:
        systems = solve_chunks(q, k, log_decay, beta, segments)
    scan = scan_chunks(q, k, v, beta, systems, segments, initial_state, store_states=True)
    grad_output = v.new_zeros(v.shape) if grad_output is None else grad_output.to(v.dtype).contiguous()
    back = _walk_back(q, k, v, systems, segments, initial_state, grad_output, grad_final_state)
    assert scan.states is not None
    assert scan.written is not None
    return _chunk_gradients(q, k, v, log_decay, beta, systems, segments, grad_output, (scan.states, scan.written), back)


class _WalkBack(NamedTuple):
    """The gradients of X, of the state that leaves each chunk, and of the initial state."""

    alone: Float[Tensor, "T Hv Dv"]
    states: Float[Tensor, "G Hv Dk Dv"]
    initial_state: Float[Tensor, "N Hv Dk Dv"] | None


def _walk_back(
    q: Tensor, k: Tensor, v: Tensor, systems: ChunkSystems, segments: Segments, initial_state: Tensor | None,
    grad_output: Tensor, grad_final_state: Tensor | None,
) -> _WalkBack:  # fmt: skip
    """Equations 1 to 3."""
    q, k = by_token(q), by_token(k)
    (_, key_heads, dk), (_, value_heads, dv) = k.shape, v.shape
    chunks, sequences = segments.cut(CHUNK), segments.cut(max(1, segments.max_length))
    alone, states = v.new_empty(v.shape), v.new_empty(chunks.count, value_heads, dk, dv)
    grad_final_state = None if grad_final_state is None else grad_final_state.contiguous()
    initial = None
    if initial_state is not None:
        # A sequence without tokens passes the gradient of its final state through.
        shape, dtype = initial_state.shape, initial_state.dtype
        initial = v.new_zeros(shape, dtype=dtype) if grad_final_state is None else grad_final_state.to(dtype, copy=True)
    if chunks.count:
        block, warps, stages = _walk_configuration(dk, dv, v.dtype)
        walk_back_kernel[(triton.cdiv(dv, block), value_heads, sequences.count)](
            *(q, k, grad_output, systems.inverse, systems.attention, systems.scales, systems.decay),
            *(alone, states, grad_final_state, initial, chunks.cu_seqlens, chunks.first, sequences.sequences),
            Q_ROW=q.stride(0), K_ROW=k.stride(0), HK=key_heads, HV=value_heads, DK=dk, DV=dv, BK=padded_width(dk),
            BV=block, L=CHUNK, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return _WalkBack(alone, states, initial)


def _chunk_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, systems: ChunkSystems, segments: Segments,
    grad_output: Tensor, kept: tuple[Tensor, Tensor], back: _WalkBack,
) -> GatedDeltaGradients:  # fmt: skip
    """Equations 4 to 8; the gradient of v takes the place of that of X."""
    q, k, v = by_token(q), by_token(k), by_token(v)
    (_, key_heads, dk), (_, value_heads, dv) = k.shape, v.shape
    chunks, (states, written) = segments.cut(CHUNK), kept
    grad_q, grad_k = q.new_empty(q.shape), k.new_empty(k.shape)
    grad_log_decay, grad_beta = log_decay.new_empty(log_decay.shape), beta.new_empty(beta.shape)
    if chunks.count:
        block, warps = _chunk_configuration(dk, dv, v.dtype)
        terms = v.new_empty(chunks.count, value_heads, 9, CHUNK, dtype=torch.float32)
        chunk_gradients_kernel[(chunks.count, key_heads)](
            *(q, k, v, grad_output, written, back.alone, states, back.states, systems.attention, systems.sums),
            *(systems.scales, systems.decay, systems.rstd_q, systems.rstd_k),
            *(grad_q, grad_k, grad_log_decay, grad_beta, terms, chunks.cu_seqlens, chunks.first, chunks.sequences),
            Q_ROW=q.stride(0), K_ROW=k.stride(0), V_ROW=v.stride(0), HK=key_heads, HV=value_heads, DK=dk, DV=dv,
            BK=padded_width(dk), BV=block, L=CHUNK, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return GatedDeltaGradients(grad_q, grad_k, back.alone, grad_log_decay, grad_beta, back.initial_state)


def _walk_configuration(dk: int, dv: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Columns of the state in a program of the walk back, warps, stages of its loads. For H100 and H200."""
    if dtype == torch.float32:
        return 16, 8, 1
    return (min(32, padded_width(dv)), 8, 2) if dk > 128 else (min(64, padded_width(dv)), 4, 2)


def _chunk_configuration(dk: int, dv: int, dtype: torch.dtype) -> tuple[int, int]:
    """Columns of the values in a block of the gradients of a chunk, and warps. For H100 and H200."""
    return min(32 if dtype == torch.float32 else 64, padded_width(dv)), 8

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
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qwen3_next.ops.common_triton import multiprocessors
from qwen3_next.ops.gated_delta_chunk_grad_triton import (
    TERMS,
    gate_gradients_kernel,
    key_gradients_kernel,
    value_gradients_kernel,
)
from qwen3_next.ops.gated_delta_chunk_triton import (
    CHUNK,
    ChunkSystems,
    by_token,
    padded_width,
    solve_chunks,
)
from qwen3_next.ops.gated_delta_scan_grad_triton import walks_kernel
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
    q, k, v = (_aligned(by_token(x)) for x in (q, k, v))
    log_decay, beta = log_decay.contiguous(), beta.contiguous()
    if systems is None:
        systems = solve_chunks(q, k, log_decay, beta, segments)
    grad_output = v.new_zeros(v.shape) if grad_output is None else _aligned(grad_output.to(v.dtype).contiguous())
    walks = _walk(q, k, v, systems, segments, initial_state, grad_output, grad_final_state)
    found = _chunk_gradients(q, k, v, log_decay, beta, systems, segments, grad_output, walks)
    return found if initial_state is not None else found._replace(initial_state=None)


class _Walks(NamedTuple):
    """What the two walks over the chunks find.

    Attributes:
        states: S, the state that enters each chunk, and dS', the gradient of the one that leaves it, in `v.dtype`.
        values: dX and Z, in `v.dtype`; zeros beyond the tokens of a chunk.
        grad_initial: dS of the first chunks.
    """

    states: Float[Tensor, "2 G Hv BK BV"]
    values: Float[Tensor, "2 G Hv L BV"]
    grad_initial: Float[Tensor, "N Hv Dk Dv"]


def _walk(
    q: Tensor, k: Tensor, v: Tensor, systems: ChunkSystems, segments: Segments, initial_state: Tensor | None,
    grad_output: Tensor, grad_final_state: Tensor | None,
) -> _Walks:  # fmt: skip
    """The states again, and equations 1 to 3."""
    (_, key_heads, dk), (_, value_heads, dv) = k.shape, v.shape
    chunks = segments.cut(CHUNK)
    states = v.new_empty(2, chunks.count, value_heads, padded_width(dk), padded_width(dv))
    values = v.new_empty(2, chunks.count, value_heads, CHUNK, padded_width(dv))
    # Zeros for states that are not given: one kernel for all calls is one to compile and to check.
    initial_state, grad_final_state = (
        v.new_zeros(segments.count, value_heads, dk, dv, dtype=torch.float32) if x is None else x.contiguous()
        for x in (initial_state, grad_final_state)
    )
    # A sequence without tokens passes the gradient of its final state through.
    grad_initial = grad_final_state.to(initial_state.dtype, copy=True)
    if chunks.count:
        forth, back = _walk_columns(segments, value_heads, padded_width(dv))
        columns = padded_width(dv) // forth + padded_width(dv) // back
        walks_kernel[(value_heads, columns, segments.count)](
            *(q, k, v, grad_output, systems.inverse, systems.attention, systems.scales, systems.decay),
            *(initial_state, grad_final_state, states[0], values[1], states[1], values[0], grad_initial),
            *(chunks.cu_seqlens, chunks.first),
            Q_ROW=q.stride(0), K_ROW=k.stride(0), V_ROW=v.stride(0), HK=key_heads, HV=value_heads, DK=dk, DV=dv,
            BK=padded_width(dk), FORTH=forth, BACK=back, VALUES=padded_width(dv), L=CHUNK, num_warps=4, num_stages=2,
        )  # fmt: skip
    return _Walks(states, values, grad_initial)


def _chunk_gradients(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, systems: ChunkSystems, segments: Segments,
    grad_output: Tensor, walks: _Walks,
) -> GatedDeltaGradients:  # fmt: skip
    """Equations 4 to 8."""
    (_, key_heads, dk), (_, value_heads, dv) = k.shape, v.shape
    chunks = segments.cut(CHUNK)
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    grad_log_decay, grad_beta = log_decay.new_empty(log_decay.shape), beta.new_empty(beta.shape)
    if chunks.count:
        terms = v.new_empty(chunks.count, value_heads, TERMS.value, CHUNK, dtype=torch.float32)
        grad_attention, grad_system = (torch.empty_like(systems.attention) for _ in range(2))
        places = (chunks.cu_seqlens, chunks.first, chunks.sequences)
        shape = {"K_ROW": k.stride(0), "HK": key_heads, "HV": value_heads, "DK": dk, "DV": dv, "L": CHUNK}
        shape |= {"BK": padded_width(dk), "BV": padded_width(dv), "num_stages": 2}
        value_gradients_kernel[(value_heads, chunks.count)](
            *(k, v, grad_output, _tiles(walks.values), systems.attention, systems.sums, systems.scales),
            *(systems.rstd_q, systems.rstd_k, grad_v, grad_attention, grad_system, terms, *places),
            chunks.count * value_heads, **shape, V_ROW=v.stride(0), num_warps=4, maxnreg=168,
        )  # fmt: skip
        key_gradients_kernel[(2 * key_heads, chunks.count)](
            *(q, k, _rows(grad_output), _tiles(walks.values), _tiles(walks.states)),
            *(_tiles(grad_attention), _tiles(grad_system), walks.states, systems.scales),
            *(systems.rstd_q, systems.rstd_k, grad_q, grad_k, terms, *places),
            chunks.count * value_heads, **shape, Q_ROW=q.stride(0), num_warps=8,
        )  # fmt: skip
        gate_gradients_kernel[(value_heads, chunks.count)](
            *(terms, systems.scales, systems.decay, grad_log_decay, grad_beta, *places),
            HV=value_heads, L=CHUNK, num_warps=2, num_stages=2,
        )  # fmt: skip
    return GatedDeltaGradients(grad_q, grad_k, grad_v, grad_log_decay, grad_beta, walks.grad_initial)


def _walk_columns(segments: Segments, heads: int, width: int) -> tuple[int, int]:
    """Columns of the state in a program that walks forth, and in one that walks back. For H100 and H200."""
    # Two programs fit on a multiprocessor. Where that leaves none waiting, the shorter step of fewer columns counts.
    waits = 2 * width // 32 * heads * segments.count > 4 * multiprocessors(segments.device)
    return min(64 if waits else 32, width), min(32, width)


def _tiles(x: Float[Tensor, "*G R C"]) -> TensorDescriptor:
    """Each `[R, C]` as one block, which a Hopper card moves without a register."""
    return TensorDescriptor.from_tensor(x.flatten(0, -2), list(x.shape[-2:]))


def _rows(x: Float[Tensor, "T H D"]) -> TensorDescriptor:
    """The tokens of a chunk of one head as one block; rows of other lengths than 16 bytes' multiples are copied."""
    x = F.pad(x, (0, -x.shape[2] * x.element_size() % 16 // x.element_size()))
    return TensorDescriptor.from_tensor(x, [CHUNK, 1, padded_width(x.shape[2])])


def _aligned(x: Float[Tensor, "T H D"]) -> Float[Tensor, "T H D"]:
    """x, or a copy, whose rows start at multiples of 16 bytes.

    Others are not fetched ahead of the walks, and a walk without that is what Triton 3.6 compiles wrongly for Hopper.
    """
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)

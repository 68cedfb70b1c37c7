"""The gated delta rule: the recurrence that defines it, and the chunked form that computes it quickly.

docs/gated_delta_rule.md derives the second from the first, in the names used here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import accelerated
from qwen3_next.ops.chunks import Chunks
from qwen3_next.ops.segments import Segments
from qwen3_next.ops.snapshots import Snapshots

CHUNK_SIZE = 64
"""Tokens whose mutual corrections are solved as one triangular system (the choice of the published model)."""

_NORM_EPS = 1e-6

_FEW_STEPS = 3
"""Up to this many tokens for every sequence, steps of the recurrence are quicker than solving a chunk."""


class GatedDeltaOutput(NamedTuple):
    """The output of each token, and the state after the last token of each sequence."""

    output: Float[Tensor, "T Hv Dv"]
    final_state: Float[Tensor, "N Hv Dk Dv"]


def gated_delta_rule_recurrent(
    q: Float[Tensor, "T Hk Dk"],
    k: Float[Tensor, "T Hk Dk"],
    v: Float[Tensor, "T Hv Dv"],
    log_decay: Float[Tensor, "T Hv"],
    beta: Float[Tensor, "T Hv"],
    segments: Segments,
    initial_state: Float[Tensor, "N Hv Dk Dv"] | None = None,
) -> GatedDeltaOutput:
    """The definition, token by token: `S <- e^log_decay S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q`.

    The state S of a head is a memory that maps keys to values. Each token lets it fade, reads what it holds under the
    key k, and writes back a fraction beta of the error. (Yang et al. 2024, arXiv:2412.06464, eq. 10.)

    Arguments, results and precision are those of `gated_delta_rule`.
    """
    args = _prepare(q, k, v, log_decay, beta, segments, initial_state)
    repeats = v.shape[1] // k.shape[1]
    q, k = (x.repeat_interleave(repeats, dim=1) for x in (args.q, args.k))
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    for start, length, state in zip(segments.starts, segments.lengths, args.state, strict=True):
        for t in range(start, start + length):
            state = state * args.log_decay[t].exp()[:, None, None]
            error = args.v[t] - torch.einsum("hkv,hk->hv", state, k[t])
            state = state + torch.einsum("hk,hv->hkv", k[t], args.beta[t, :, None] * error)
            outputs.append(torch.einsum("hkv,hk->hv", state, q[t]))
        states.append(state)
    output = torch.stack(outputs).to(v.dtype) if outputs else torch.zeros_like(v)
    return GatedDeltaOutput(output, torch.stack(states) if states else args.state.clone())


@accelerated("gated_delta_triton")
def gated_delta_rule(
    q: Float[Tensor, "T Hk Dk"],
    k: Float[Tensor, "T Hk Dk"],
    v: Float[Tensor, "T Hv Dv"],
    log_decay: Float[Tensor, "T Hv"],
    beta: Float[Tensor, "T Hv"],
    segments: Segments,
    initial_state: Float[Tensor, "N Hv Dk Dv"] | None = None,
) -> GatedDeltaOutput:
    """The recurrence of `gated_delta_rule_recurrent`, computed in chunks of 64 tokens by matrix products.

    Value head h uses key head `h // (Hv / Hk)`. Each q and k is divided by its length, `sqrt(|x|^2 + 1e-6)`, and q by
    `sqrt(Dk)`, in here. Everything is computed in fp32 (fp64 for fp64 inputs). (Yang et al. 2024, arXiv:2412.06464,
    section 3.3; Yang et al. 2024, arXiv:2406.06484, section 3.)

    Args:
        log_decay: at most 0; `e^log_decay` is the share of the state that survives a token.
        beta: in [0, 1]: the share of the error that a token corrects.
        initial_state: the state before the first token of each sequence; None means zeros.

    Returns:
        `output` in `v.dtype`, and `final_state` in fp32 (fp64 for fp64 inputs), which for a sequence without tokens
        equals its initial state. Inputs are never modified.
    """
    args = _prepare(q, k, v, log_decay, beta, segments, initial_state)
    if segments.total == 0:
        return GatedDeltaOutput(torch.zeros_like(v), args.state.clone())
    if segments.is_uniform and segments.max_length <= _FEW_STEPS:
        output, state = _steps(args, segments.count)
    else:
        output, state = _chunked(args, Chunks.of(segments, min(CHUNK_SIZE, segments.max_length)))
    return GatedDeltaOutput(output.to(v.dtype), state)


@accelerated("gated_delta_triton")
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
    """`gated_delta_rule` on states that live in slots: sequence n reads `states[slots[n]]` and leaves its own there.

    A sequence without tokens leaves its slot alone. Has no gradient.

    Args:
        slots: the slots of sequences that have tokens are distinct.
        snapshots: states in the middle of the call, copied into further slots.

    Returns:
        The output of each token, in `v.dtype`.
    """
    if snapshots is None:
        output, current = gated_delta_rule(q, k, v, log_decay, beta, segments, states[slots])
    else:
        output, current = torch.empty_like(v), states[slots]
        for turn in _turns(segments, snapshots):
            rows = torch.tensor([t for piece in turn for t in piece.tokens], dtype=torch.long, device=v.device)
            pieces = Segments.from_lengths([len(piece.tokens) for piece in turn], v.device)
            parts = (q[rows], k[rows], v[rows], log_decay[rows], beta[rows])
            output[rows], current = gated_delta_rule(*parts, pieces, current)
            for n, piece in enumerate(turn):
                if piece.snapshot is not None:
                    states[snapshots.slots[piece.snapshot]] = current[n].to(states.dtype)
    busy = torch.tensor([n for n, length in enumerate(segments.lengths) if length], dtype=torch.long, device=v.device)
    states[slots[busy]] = current[busy].to(states.dtype)
    return output


class _Piece(NamedTuple):
    """Tokens of one sequence, and the index of the snapshot that is taken after them."""

    tokens: range
    snapshot: int | None


def _turns(segments: Segments, snapshots: Snapshots) -> Iterator[list[_Piece]]:
    """In each turn every sequence goes on to its next snapshot, at last to its end, then nowhere."""
    taken = snapshots.by_sequence(segments)
    positions = list(segments.starts)
    for turn in range(max(map(len, taken), default=0) + 1):
        pieces: list[_Piece] = []
        for n, (start, length) in enumerate(zip(segments.starts, segments.lengths, strict=True)):
            snapshot = taken[n][turn] if turn < len(taken[n]) else None
            stop = start + length if snapshot is None else snapshots.positions[snapshot]
            pieces.append(_Piece(range(positions[n], stop), snapshot))
            positions[n] = stop
        yield pieces


@dataclass(frozen=True, eq=False)
class _Arguments:
    """The arguments in the dtype of the computation, q and k normalised, q scaled."""

    q: Float[Tensor, "T Hk Dk"]
    k: Float[Tensor, "T Hk Dk"]
    v: Float[Tensor, "T Hv Dv"]
    log_decay: Float[Tensor, "T Hv"]
    beta: Float[Tensor, "T Hv"]
    state: Float[Tensor, "N Hv Dk Dv"]


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, segments: Segments, state: Tensor | None
) -> _Arguments:
    dtype = torch.promote_types(v.dtype, torch.float32)
    width = q.shape[-1]
    if state is None:
        state = v.new_zeros(segments.count, v.shape[1], width, v.shape[2], dtype=dtype)
    # |x|^2 is `width` times the mean square that the (fused) RMS norm divides by.
    q, k = F.rms_norm(torch.stack([q, k]).to(dtype), (width,), None, _NORM_EPS / width).unbind()
    q, k = q * (1 / width), k * width**-0.5
    return _Arguments(q, k, v.to(dtype), log_decay.to(dtype), beta.to(dtype), state.to(dtype))


def _steps(args: _Arguments, count: int) -> tuple[Float[Tensor, "T Hv Dv"], Float[Tensor, "N Hv Dk Dv"]]:
    """The recurrence itself, for `count` sequences of one (small) length at once."""
    heads = args.v.shape[1]
    q, k = (x.repeat_interleave(heads // x.shape[1], dim=1)[:, :, None] for x in (args.q, args.k))
    fields = (q, k, args.v[:, :, None], args.log_decay.exp()[..., None, None], args.beta[..., None, None])
    tokens = (x.unflatten(0, (count, -1)).transpose(0, 1).flatten(1, 2).unbind() for x in fields)
    state = args.state.flatten(0, 1)
    outputs: list[Tensor] = []
    for q_t, k_t, v_t, decay, beta in zip(*tokens, strict=True):
        output, state = _step(q_t, k_t, v_t, decay, beta, state)
        outputs.append(output.view(count, 1, heads, -1))
    return _concatenate(outputs, dim=1).flatten(0, 1), state.unflatten(0, (count, heads))


def _step(
    q: Float[Tensor, "M 1 Dk"],
    k: Float[Tensor, "M 1 Dk"],
    v: Float[Tensor, "M 1 Dv"],
    decay: Float[Tensor, "M 1 1"],
    beta: Float[Tensor, "M 1 1"],
    state: Float[Tensor, "M Dk Dv"],
) -> tuple[Float[Tensor, "M 1 Dv"], Float[Tensor, "M Dk Dv"]]:
    """One token for each of M sequences x heads."""
    faded = state * decay
    correction = beta * torch.baddbmm(v, k, faded, alpha=-1)
    # The state is by far the largest operand. Autograd needs `faded` for the gradient of k; nobody else does.
    write = torch.Tensor.addcmul if torch.is_grad_enabled() else torch.Tensor.addcmul_
    state = write(faded, k.mT, correction)
    return q @ state, state


_WAVE = {"cpu": 128, "cuda": 16384}
"""Chunks x heads solved at a time: on a CPU so that the passes over them run in cache, on a GPU to bound the memory."""


def _chunked(args: _Arguments, chunks: Chunks) -> tuple[Float[Tensor, "T Hv Dv"], Float[Tensor, "N Hv Dk Dv"]]:
    heads = args.v.shape[1]
    fields = (args.q, args.k, args.v, args.log_decay[..., None], args.beta[..., None])
    waves = _waves(chunks.active, max(1, _WAVE.get(args.v.device.type, 16384) // heads))
    grids = (chunks.split(x).split([sum(wave) for wave in waves]) for x in fields)
    state = chunks.sort(args.state).flatten(0, 1)
    outputs: list[Tensor] = []
    for wave, grid in zip(waves, zip(*grids, strict=True), strict=True):
        scan = _scan_transitions if state.is_cuda and len(wave) > 1 else _scan_updates
        output, state = scan(_solve_chunks(*grid), state, [heads * active for active in wave])
        outputs.append(output)
    output = chunks.join(_concatenate(outputs).unflatten(0, (-1, heads)), args.v.shape[0])
    return output, chunks.unsort(state.unflatten(0, (-1, heads)))


def _waves(active: Sequence[int], limit: int) -> list[list[int]]:
    """Runs of consecutive entries whose sums stay within `limit`, where a single entry does."""
    waves: list[list[int]] = []
    for count in active:
        if waves and sum(waves[-1]) + count <= limit:
            waves[-1].append(count)
        else:
            waves.append([count])
    return waves


@dataclass(frozen=True, eq=False)
class _ChunkParts:
    """What each chunk contributes, independently of the state that enters it. L tokens in a chunk, M chunks x heads.

    With S the entering state, `written = u - w S` are the values that the chunk's tokens really write,
    `q_decayed S + attention written` is the output and `decay S + k_decayed^T written` the state that leaves.
    """

    u: Float[Tensor, "M L Dv"]
    w: Float[Tensor, "M L Dk"]
    q_decayed: Float[Tensor, "M L Dk"]
    k_decayed: Float[Tensor, "M L Dk"]
    attention: Float[Tensor, "M L L"]
    decay: Float[Tensor, "M 1 1"]


def _solve_chunks(
    q: Float[Tensor, "G Hk L Dk"],
    k: Float[Tensor, "G Hk L Dk"],
    v: Float[Tensor, "G Hv L Dv"],
    log_decay: Float[Tensor, "G Hv L 1"],
    beta: Float[Tensor, "G Hv L 1"],
) -> _ChunkParts:
    """All that does not need the state, for G chunks at once."""
    v, log_decay, beta = (x.unflatten(1, (k.shape[1], -1)) for x in (v, log_decay, beta))  # [G Hk Hv/Hk L ...]
    # Sums reach -1000s; in fp64 their differences keep the precision of the single terms.
    sums = log_decay.double().cumsum(dim=-2)
    ratios = _decay_ratios(sums, k.dtype)
    survived = sums.to(k.dtype).exp()
    inverse = _unit_lower_inverse(beta * ratios * (k @ k.mT)[:, :, None]) * beta.mT
    parts = (
        inverse @ v,
        _times_shared(inverse * survived.mT, k),
        q[:, :, None] * survived,
        k[:, :, None] * ratios[..., -1:, :].mT,
        ratios * (q @ k.mT)[:, :, None],
        survived[..., -1:, :],
    )
    return _ChunkParts(*(x.flatten(0, 2) for x in parts))


def _decay_ratios(sums: Float[Tensor, "*B L 1"], dtype: torch.dtype) -> Float[Tensor, "*B L L"]:
    """`e^(sums_i - sums_j)` for j <= i, else 0: how much of what token j wrote is left at token i.

    Masked before the exponential: above the diagonal it could be infinite, and infinity times the 0 of a later mask
    would be NaN in the backward pass.
    """
    length = sums.shape[-2]
    future = torch.ones(length, length, dtype=torch.bool, device=sums.device).triu(1)
    return (sums - sums.mT).to(dtype).masked_fill_(future, float("-inf")).exp_()


def _unit_lower_inverse(system: Float[Tensor, "*B L L"]) -> Float[Tensor, "*B L L"]:
    """The inverse of `I + tril(system, -1)`, by substitution: stable for any keys, unlike a series of powers."""
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system, identity.expand_as(system), upper=False, unitriangular=True)


def _times_shared(x: Float[Tensor, "G Hk R L L"], k: Float[Tensor, "G Hk L Dk"]) -> Float[Tensor, "G Hk R L Dk"]:
    """`x @ k` with the R value heads of a key head as rows of one product, so that k is not repeated for each."""
    return (x.flatten(2, 3) @ k).unflatten(2, x.shape[2:4])


def _scan_updates(
    parts: _ChunkParts, state: Float[Tensor, "B Dk Dv"], active: Sequence[int]
) -> tuple[Float[Tensor, "M L Dv"], Float[Tensor, "B Dk Dv"]]:
    """Chunk after chunk: the fewest operations, several launches per chunk. B = N Hv states, M = G Hv chunks."""
    fields = (parts.u, parts.w, parts.q_decayed, parts.k_decayed, parts.attention, parts.decay)
    outputs: list[Tensor] = []
    finished: list[Tensor] = []
    for u, w, q, k, attention, decay in zip(*(x.split(list(active)) for x in fields), strict=True):
        state = _drop_ended(state, u.shape[0], finished)
        written = torch.baddbmm(u, w, state, alpha=-1)
        outputs.append(torch.baddbmm(q @ state, attention, written))
        state = torch.baddbmm(decay * state, k.mT, written)
    return _concatenate(outputs), _concatenate([state, *reversed(finished)])


def _scan_transitions(
    parts: _ChunkParts, state: Float[Tensor, "B Dk Dv"], active: Sequence[int]
) -> tuple[Float[Tensor, "M L Dv"], Float[Tensor, "B Dk Dv"]]:
    """`S <- M S + B` with `M = decay I - k_decayed^T w` and `B = k_decayed^T u`: one launch per chunk."""
    faded = parts.decay * torch.eye(state.shape[1], dtype=state.dtype, device=state.device)
    transitions = torch.baddbmm(faded, parts.k_decayed.mT, parts.w, alpha=-1)
    additions = parts.k_decayed.mT @ parts.u
    entering: list[Tensor] = []
    finished: list[Tensor] = []
    for transition, addition in zip(transitions.split(list(active)), additions.split(list(active)), strict=True):
        state = _drop_ended(state, transition.shape[0], finished)
        entering.append(state)
        state = torch.baddbmm(addition, transition, state)
    states = _concatenate(entering)
    written = torch.baddbmm(parts.u, parts.w, states, alpha=-1)
    output = torch.baddbmm(parts.q_decayed @ states, parts.attention, written)
    return output, _concatenate([state, *reversed(finished)])


def _drop_ended(state: Float[Tensor, "B Dk Dv"], active: int, finished: list[Tensor]) -> Float[Tensor, "A Dk Dv"]:
    """Only the first `active` sequences x heads have another chunk; the states of the others go to `finished`."""
    if active == state.shape[0]:
        return state
    finished.append(state[active:])
    return state[:active]


def _concatenate(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

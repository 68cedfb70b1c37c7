"""A few new tokens per sequence through a DeltaNet layer, in one launch.

A program owns one key head of one sequence with all its value heads, so that whatever it writes (states, windows,
pending tokens) nobody else reads. First it prepares the tokens, all at once, while the first state is on its way: it
convolves q, k and v and finds norms and gates, into scratch memory that it alone reads. Then it takes the tokens one by
one through the states of `TILE` value heads at a time, which it holds in registers: read once, written once.
"""
# pyright: basic

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from qwen3_next.ops.backend import refuses
from qwen3_next.ops.causal_conv import ProjectionColumns
from qwen3_next.ops.gated_delta_step import StepState, StepWeights
from qwen3_next.ops.segments import Segments


def _refusal(
    qkvz: Tensor,
    ba: Tensor,
    weights: StepWeights,
    state: StepState,
    slots: Tensor,
    segments: Segments,
    accepted: Tensor | None = None,
) -> str | None:
    if torch.float64 in (qkvz.dtype, ba.dtype, state.recurrent.dtype):
        return "fp64 is not computed on the GPU"
    if weights.conv.shape[1] > 4:
        return "more than four taps"
    if (state.conv.dtype, state.pending_qkv.dtype, state.pending_ba.dtype) != (qkvz.dtype, qkvz.dtype, ba.dtype):
        return "the inputs that a state keeps have another dtype than the new ones"
    kept = (state.recurrent, state.conv, state.pending_qkv, state.pending_ba)
    return None if all(x[:1].is_contiguous() for x in kept) else "a slot of the state is not contiguous"


@refuses(_refusal)
@torch.no_grad()
def delta_net_step_(
    qkvz: Float[Tensor, "T P"],
    ba: Float[Tensor, "T 2*Hv"],
    weights: StepWeights,
    state: StepState,
    slots: Int[Tensor, "N"],
    segments: Segments,
    accepted: Int[Tensor, "N"] | None = None,
) -> Float[Tensor, "T Hv*Dv"]:
    """The twin of `ops.gated_delta_step.delta_net_step_`."""
    columns, room = weights.columns, 0
    if accepted is not None:
        room = state.pending_qkv.shape[1]
        state.require_room(segments.max_length)
    qkvz, ba = (x if x.stride(1) == 1 else x.contiguous() for x in (qkvz, ba))
    output = qkvz.new_empty(qkvz.shape[0], columns.value_heads * columns.value_width)
    programs, repeats = segments.count * columns.key_heads, columns.value_heads // columns.key_heads
    tokens = triton.next_power_of_2(max(1, room + segments.max_length))
    vectors = qkvz.new_empty(programs, tokens, 2 * columns.key_width + columns.values)
    scalars = qkvz.new_empty(programs, tokens, 2 + 2 * repeats, dtype=torch.float32)
    settings = _configuration(columns, state.recurrent.dtype, accepted is not None)
    if programs:
        _step_kernel[(programs,)](
            *(qkvz, ba, weights.conv.contiguous(), weights.A_log, weights.dt_bias, weights.norm),
            *(state.recurrent, state.conv, state.pending_qkv, state.pending_ba, slots, segments.cu_seqlens),
            *(accepted, vectors, scalars, output, qkvz.stride(0), ba.stride(0)),
            *(state.recurrent.stride(0), state.conv.stride(0), state.pending_qkv.stride(0)),
            *(state.pending_ba.stride(0), weights.eps, columns.key_width**-0.5),
            HEADS=columns.key_heads, REPEATS=repeats, KEY=columns.key_width, VALUE=columns.value_width,
            TAPS=weights.conv.shape[1], LENGTH=segments.max_length if segments.is_uniform else -1,
            TOKENS=tokens, **settings,
        )  # fmt: skip
    return output


def _configuration(columns: ProjectionColumns, dtype: torch.dtype, replays: bool) -> dict[str, int]:
    """For H100 and H200: four warps hold an fp32 state with nothing to spare; replays need more room."""
    padded_key, padded_value = (triton.next_power_of_2(x) for x in (columns.key_width, columns.value_width))
    is_light = dtype == torch.float32 and not replays and padded_key * padded_value <= 128 * 128
    warps, registers = (4, 255) if is_light else (8, 128)
    rows = 32 * warps * (16 // dtype.itemsize) // padded_value  # that all threads load at once, 16 bytes each
    rows = max(1, min(padded_key, rows))
    return {"TILE": 1, "ROWS": rows, "EARLY": not replays, "num_warps": warps, "maxnreg": registers}


@triton.jit(do_not_specialize=["eps", "q_scale"])
def _step_kernel(
    p_qkvz, p_ba, p_conv, p_a_log, p_dt_bias, p_norm,
    p_recurrent, p_window, p_pending, p_pending_ba, p_slots, p_cu_seqlens, p_accepted, p_vectors, p_scalars, p_output,
    row_stride, ba_stride, recurrent_stride, window_stride, pending_stride, pending_ba_stride, eps, q_scale,
    HEADS: tl.constexpr, REPEATS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, TAPS: tl.constexpr,
    LENGTH: tl.constexpr, TOKENS: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """LENGTH: the number of new tokens of every sequence, or -1 where it differs."""
    i_sequence, i_key = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    slot = tl.load(p_slots + i_sequence).to(tl.int64)
    start, count = i_sequence * LENGTH, LENGTH
    if LENGTH == -1:
        start = tl.load(p_cu_seqlens + i_sequence)
        count = tl.load(p_cu_seqlens + i_sequence + 1) - start
    values: tl.constexpr = REPEATS * VALUE
    p_output += start.to(tl.int64) * (HEADS * values) + i_key * values
    if slot < 0:
        _store_zeros(p_output, count, HEADS * values, values)
        return
    p_recurrent += slot * recurrent_stride + i_key * (REPEATS * KEY * VALUE)
    if EARLY:
        b_state = _load_state(p_recurrent, 0, KEY, VALUE, TILE, ROWS)
    accepted = 0 if p_accepted is None else tl.load(p_accepted + i_sequence)
    done = count if p_accepted is None else accepted
    p_row = p_qkvz + start.to(tl.int64) * row_stride + i_key * (2 * KEY + 2 * values)
    p_window += slot * window_stride
    p_vectors += tl.program_id(0) * (TOKENS * (2 * KEY + values))
    p_scalars += tl.program_id(0) * (TOKENS * (2 + 2 * REPEATS))
    if p_accepted is None:
        places = (p_window, None, p_row, row_stride, 0)
    else:
        p_pending += slot * pending_stride
        places = (p_window, p_pending, p_row, row_stride, accepted)
    vector: tl.constexpr = 2 * KEY + values
    scalars: tl.constexpr = 2 + 2 * REPEATS
    channels: tl.constexpr = HEADS * vector
    q_channel, k_channel, v_channel = i_key * KEY, (HEADS + i_key) * KEY, 2 * HEADS * KEY + i_key * values
    q_window = _convolve(
        places, p_conv, p_vectors, p_scalars, q_channel, 0, count, done, KEY, vector, scalars, channels, TAPS, TOKENS
    )
    k_window = _convolve(
        places,
        p_conv,
        p_vectors,
        p_scalars + 1,
        k_channel,
        KEY,
        count,
        done,
        KEY,
        vector,
        scalars,
        channels,
        TAPS,
        TOKENS,
    )
    v_window = _convolve(
        places,
        p_conv,
        p_vectors,
        None,
        v_channel,
        2 * KEY,
        count,
        done,
        values,
        vector,
        scalars,
        channels,
        TAPS,
        TOKENS,
    )
    p_ba += start.to(tl.int64) * ba_stride + i_key * (2 * REPEATS)
    p_pending_ba += slot * pending_ba_stride + i_key * (2 * REPEATS)
    _find_gates(
        p_ba, p_pending_ba, p_a_log + i_key * REPEATS, p_dt_bias + i_key * REPEATS, p_scalars,
        ba_stride, accepted, count, HEADS, REPEATS, TOKENS,
    )  # fmt: skip
    tl.debug_barrier()  # what was read is written from here on, and what was written read
    _store_window(p_window, q_window, q_channel, KEY, TAPS)
    _store_window(p_window, k_window, k_channel, KEY, TAPS)
    _store_window(p_window, v_window, v_channel, values, TAPS)
    if p_accepted is not None:
        _leave_pending(p_row, row_stride, p_pending + q_channel, channels, count, KEY, TOKENS)
        _leave_pending(p_row + KEY, row_stride, p_pending + k_channel, channels, count, KEY, TOKENS)
        _leave_pending(p_row + 2 * KEY, row_stride, p_pending + v_channel, channels, count, values, TOKENS)
        _leave_pending(p_ba, ba_stride, p_pending_ba, 2 * HEADS * REPEATS, count, 2 * REPEATS, TOKENS)
    for first in tl.static_range(0, REPEATS, TILE):
        if first > 0 or not EARLY:
            b_state = _load_state(p_recurrent, first, KEY, VALUE, TILE, ROWS)
        if p_accepted is not None:
            for t in range(accepted):
                b_k, b_v, b_decay, b_beta = _token(p_vectors, p_scalars, t, first, REPEATS, KEY, VALUE, TILE, ROWS)
                b_state = _updated(b_state, b_k, b_v, b_decay, b_beta)
            _store_state(p_recurrent, b_state, first, KEY, VALUE, TILE, ROWS)
        for t in range(count):
            b_k, b_v, b_decay, b_beta = _token(
                p_vectors, p_scalars, accepted + t, first, REPEATS, KEY, VALUE, TILE, ROWS
            )
            b_q = _unit_vector(p_vectors, p_scalars, accepted + t, 0, REPEATS, KEY, VALUE, ROWS) * q_scale
            b_state = _updated(b_state, b_k, b_v, b_decay, b_beta)
            b_output = _read(b_state, b_q)
            o_v, in_value, o_inside = _values(first, VALUE, TILE)
            b_z = tl.load(p_row + t * row_stride + 2 * KEY + values + o_v, in_value, other=0.0).to(tl.float32)
            b_weight = tl.load(p_norm + o_inside, in_value, other=0.0).to(tl.float32)
            b_output = _normed(b_output, eps, VALUE, TILE) * b_weight * _silu(b_z)
            p_out = p_output + t * (HEADS * values) + o_v
            tl.store(p_out, b_output.to(p_output.dtype.element_ty), in_value)
        if p_accepted is None:
            _store_state(p_recurrent, b_state, first, KEY, VALUE, TILE, ROWS)


@triton.jit
def _convolve(
    places, p_conv, p_vectors, p_scalars, channel, column, count, done,
    WIDTH: tl.constexpr, VECTOR: tl.constexpr, SCALARS: tl.constexpr, CHANNELS: tl.constexpr, TAPS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """Write WIDTH channels of all tokens to the scratch memory, and 1 / |x| of each; hand back the window to keep.

    Token 0 is the first accepted one, or the first new one; before it comes the window that the state holds.
    """
    o_inside, o_token = tl.arange(0, triton.next_power_of_2(WIDTH)), tl.arange(0, TOKENS)
    o_channel, o_column, exists = channel + o_inside, column + o_inside, o_inside < WIDTH
    is_token = o_token < places[4] + count
    is_entry = is_token[:, None] & exists[None, :]
    b_sum = tl.zeros([TOKENS, triton.next_power_of_2(WIDTH)], dtype=tl.float32)
    for i in tl.static_range(TAPS):
        row = o_token - (TAPS - 1) + i
        b_x = _inputs(places, row[:, None], o_channel[None, :], o_column[None, :], is_entry, CHANNELS, TAPS)
        b_sum += b_x * tl.load(p_conv + o_channel * TAPS + i, exists, other=0.0).to(tl.float32)[None, :]
    b_output = _silu(b_sum).to(p_vectors.dtype.element_ty)  # rounded as the convolution of a prompt is
    tl.store(p_vectors + o_token[:, None] * VECTOR + o_column[None, :], b_output, is_entry)
    if p_scalars is not None:
        b_output = b_output.to(tl.float32)
        tl.store(p_scalars + o_token * SCALARS, tl.rsqrt(tl.sum(b_output * b_output, axis=1) + 1e-6), is_token)
    window = ()
    for i in tl.static_range(TAPS - 1):
        window += (_inputs(places, done - (TAPS - 1) + i, o_channel, o_column, exists, CHANNELS, TAPS),)
    return window


@triton.jit
def _inputs(places, row, o_channel, o_column, exists, CHANNELS: tl.constexpr, TAPS: tl.constexpr):
    """The inputs of the convolution at these tokens; the window lies at -(TAPS - 1) to -1."""
    p_window, p_pending, p_row, row_stride, accepted = places
    p_entry = p_window + o_channel * (TAPS - 1) + row + (TAPS - 1)
    b_x = tl.load(p_entry, exists & (row < 0), other=0.0).to(tl.float32)
    if p_pending is not None:
        p_entry = p_pending + row * CHANNELS + o_channel
        b_x += tl.load(p_entry, exists & (row >= 0) & (row < accepted), other=0.0).to(tl.float32)
    p_entry = p_row + (row - accepted) * row_stride + o_column
    return b_x + tl.load(p_entry, exists & (row >= accepted), other=0.0).to(tl.float32)


@triton.jit
def _store_window(p_window, window, channel, WIDTH: tl.constexpr, TAPS: tl.constexpr):
    o_inside = tl.arange(0, triton.next_power_of_2(WIDTH))
    for i in tl.static_range(TAPS - 1):
        p_entry = p_window + (channel + o_inside) * (TAPS - 1) + i
        tl.store(p_entry, window[i].to(p_window.dtype.element_ty), o_inside < WIDTH)


@triton.jit
def _find_gates(
    p_ba, p_pending_ba, p_a_log, p_dt_bias, p_scalars, ba_stride, accepted, count,
    HEADS: tl.constexpr, REPEATS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write, for all tokens, the share of each state that survives, and beta."""
    o_head, o_token = tl.arange(0, triton.next_power_of_2(REPEATS)), tl.arange(0, TOKENS)
    is_head = o_head < REPEATS
    is_entry = (o_token < accepted + count)[:, None] & is_head[None, :]
    is_pending = is_entry & (o_token < accepted)[:, None]
    is_new = is_entry & (o_token >= accepted)[:, None]
    p_old = p_pending_ba + o_token[:, None] * (2 * HEADS * REPEATS) + o_head[None, :]
    p_new = p_ba + (o_token - accepted)[:, None] * ba_stride + o_head[None, :]
    b_b = tl.load(p_old, is_pending, other=0.0).to(tl.float32) + tl.load(p_new, is_new, other=0.0).to(tl.float32)
    b_a = tl.load(p_old + REPEATS, is_pending, other=0.0).to(tl.float32)
    b_a += tl.load(p_new + REPEATS, is_new, other=0.0).to(tl.float32)
    b_x = b_a + tl.load(p_dt_bias + o_head, is_head, other=0.0).to(tl.float32)[None, :]
    b_softplus = tl.maximum(b_x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b_x)))
    b_rate = tl.exp(tl.load(p_a_log + o_head, is_head, other=0.0).to(tl.float32))
    p_gate = p_scalars + o_token[:, None] * (2 + 2 * REPEATS) + 2 + o_head[None, :]
    tl.store(p_gate, tl.exp(-b_rate[None, :] * b_softplus), is_entry)
    tl.store(p_gate + REPEATS, tl.sigmoid(b_b), is_entry)


@triton.jit
def _leave_pending(p_new, new_stride, p_kept, kept_stride, count, WIDTH: tl.constexpr, TOKENS: tl.constexpr):
    o_token, o_inside = tl.arange(0, TOKENS)[:, None], tl.arange(0, triton.next_power_of_2(WIDTH))[None, :]
    exists = (o_token < count) & (o_inside < WIDTH)
    tl.store(
        p_kept + o_token * kept_stride + o_inside, tl.load(p_new + o_token * new_stride + o_inside, exists), exists
    )


@triton.jit
def _token(
    p_vectors, p_scalars, t, first,
    REPEATS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """k, v, the share of the state that survives and beta of a prepared token; the latter three per column."""
    b_k = _unit_vector(p_vectors, p_scalars, t, 1, REPEATS, KEY, VALUE, ROWS)
    o_v, in_value, _ = _values(first, VALUE, TILE)
    b_v = tl.load(p_vectors + t * (2 * KEY + REPEATS * VALUE) + 2 * KEY + o_v, in_value, other=0.0).to(tl.float32)
    p_gate = p_scalars + t * (2 + 2 * REPEATS) + 2 + first + _head_of_column(VALUE, TILE)
    return b_k, b_v, tl.load(p_gate), tl.load(p_gate + REPEATS)


@triton.jit
def _unit_vector(
    p_vectors, p_scalars, t, WHICH: tl.constexpr, REPEATS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """q (WHICH = 0) or k (1) of a prepared token, as the rows of a state."""
    o_warp, o_register = _rows(KEY, ROWS)
    p_entry = p_vectors + t * (2 * KEY + REPEATS * VALUE) + WHICH * KEY + o_warp + o_register
    b_x = tl.load(p_entry, o_warp + o_register < KEY, other=0.0).to(tl.float32)
    return b_x * tl.load(p_scalars + t * (2 + 2 * REPEATS) + WHICH)


@triton.jit
def _updated(b_state, b_k, b_v, b_decay, b_beta):
    """`S <- decay S;  S <- S + k (beta (v - S^T k))^T`."""
    b_state *= b_decay[None, None, :]
    return b_state + b_k[:, :, None] * (b_beta * (b_v - _read(b_state, b_k)))[None, None, :]


@triton.jit
def _read(b_state, b_key):
    return tl.sum(tl.sum(b_state * b_key[:, :, None], axis=1), axis=0)


@triton.jit
def _rows(KEY: tl.constexpr, ROWS: tl.constexpr):
    """The rows of a state in two dimensions: threads, and registers, whose addresses differ by constants."""
    return tl.arange(0, ROWS)[:, None], tl.arange(0, triton.next_power_of_2(KEY) // ROWS)[None, :] * ROWS


@triton.jit
def _head_of_column(VALUE: tl.constexpr, TILE: tl.constexpr):
    """The columns of a tile are those of its value heads side by side, each padded to a power of two."""
    padded: tl.constexpr = triton.next_power_of_2(VALUE)
    return tl.arange(0, TILE * padded) // padded


@triton.jit
def _values(first, VALUE: tl.constexpr, TILE: tl.constexpr):
    """Of each column: its place among the values of the program, whether it exists, its place in its head."""
    padded: tl.constexpr = triton.next_power_of_2(VALUE)
    o_inside = tl.arange(0, TILE * padded) % padded
    return (first + _head_of_column(VALUE, TILE)) * VALUE + o_inside, o_inside < VALUE, o_inside


@triton.jit
def _state_places(p_recurrent, first, KEY: tl.constexpr, VALUE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    o_warp, o_register = _rows(KEY, ROWS)
    _, in_value, o_inside = _values(first, VALUE, TILE)
    o_column = (first + _head_of_column(VALUE, TILE)) * (KEY * VALUE) + o_inside
    exists = (o_warp + o_register < KEY)[:, :, None] & in_value[None, None, :]
    p_row = p_recurrent + (o_warp[:, :, None] * VALUE + o_column[None, None, :])
    return p_row + o_register[:, :, None] * VALUE, exists


@triton.jit
def _load_state(p_recurrent, first, KEY: tl.constexpr, VALUE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    p_state, exists = _state_places(p_recurrent, first, KEY, VALUE, TILE, ROWS)
    return tl.load(p_state, exists, other=0.0).to(tl.float32)


@triton.jit
def _store_state(
    p_recurrent, b_state, first, KEY: tl.constexpr, VALUE: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr
):
    p_state, exists = _state_places(p_recurrent, first, KEY, VALUE, TILE, ROWS)
    tl.store(p_state, b_state.to(p_recurrent.dtype.element_ty), exists)


@triton.jit
def _store_zeros(p_output, count, row_stride, WIDTH: tl.constexpr):
    o_column = tl.arange(0, triton.next_power_of_2(WIDTH))
    for t in range(count):
        b_zero = tl.zeros_like(o_column).to(p_output.dtype.element_ty)
        tl.store(p_output + t * row_stride + o_column, b_zero, o_column < WIDTH)


@triton.jit
def _silu(b_x):
    return b_x / (1.0 + tl.exp(-b_x))


@triton.jit
def _normed(b_output, eps, VALUE: tl.constexpr, TILE: tl.constexpr):
    """Each head divided by the root of its mean square."""
    padded: tl.constexpr = triton.next_power_of_2(VALUE)
    if TILE == 1:
        b_output *= tl.rsqrt(tl.sum(b_output * b_output, axis=0) / VALUE + eps)
    else:
        b_heads = tl.reshape(b_output, [TILE, padded])
        b_mean = tl.sum(b_heads * b_heads, axis=1) / VALUE
        b_output = tl.reshape(b_heads * tl.rsqrt(b_mean + eps)[:, None], [TILE * padded])
    return b_output

"""The walk over the chunks of the gated delta rule on Hopper GPUs; gated_delta_chunk_triton.py launches the kernel.

For heads of 64 or 128 channels in 16 bits, and written in Gluon, Triton's language below its compiler's choices. One
warp fetches what the next chunks need; four carry S^T from chunk to chunk, so that each product of the chain finds the
result of the one before it in registers, as its left operand. The products that only outputs need run on the tensor
cores while the chain computes what it needs next. In the names of docs/gated_delta_rule.md; equations 3 to 5.

The tiles of a chunk lie in a stage: `ready` says that they have come, `free` that nobody reads them any more.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def as_tiles(x: Tensor, shape: list[int]) -> TensorDescriptor:
    """x as the kernels for Hopper copy it: in tiles of this shape, zeros beyond the borders."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, _tile_layout(tuple(shape), x.dtype))


@cache
def _tile_layout(shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    dtypes = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
    return gl.NVMMASharedLayout.get_default_for(list(shape), dtypes[dtype])


@gluon.jit
def walk_kernel(
    q, k, v, inverse, attention, scales, decays, output, p_output, p_initial, p_final, p_slots, p_targets,
    p_cu_parts, p_first_chunk, p_first_part, initial_stride, final_stride,
    HK: gl.constexpr, HV: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, BV: gl.constexpr, L: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One sequence, one value head, BV columns of its state: `gated_delta_scan_triton.walk_kernel` says the rest."""
    dtype: gl.constexpr = k.dtype
    i_column, i_head, i_sequence = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    key_column = i_head // (HV // HK) * DK
    value_column = i_head * DV + i_column * BV
    tiles = (
        gl.allocate_shared_memory(dtype, [STAGES, L, DK], q.layout),
        gl.allocate_shared_memory(dtype, [STAGES, L, DK], k.layout),
        gl.allocate_shared_memory(dtype, [STAGES, L, BV], v.layout),
        gl.allocate_shared_memory(dtype, [STAGES, L, L], inverse.layout),
        gl.allocate_shared_memory(dtype, [STAGES, L, L], attention.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 4 * L], scales.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 32], decays.layout),
    )
    output_tile = gl.allocate_shared_memory(dtype, [L, BV], output.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    slot = i_sequence if p_slots is None else gl.load(p_slots + i_sequence)
    if p_first_part is None:
        first_part, last_part = i_sequence, i_sequence + 1
    else:
        first_part, last_part = gl.load(p_first_part + i_sequence), gl.load(p_first_part + i_sequence + 1)
    barriers = (ready, free)
    parts = (p_cu_parts, p_first_chunk, first_part, last_part, i_head)
    states = (p_initial, p_final, p_targets, slot, initial_stride, final_stride, p_first_part)
    gl.warp_specialize(
        [
            (_carry, (tiles, output_tile, output, p_output, barriers, parts, states, i_column, value_column,
                      HV, DK, DV, BV, L, STAGES)),
            (_fetch, ((q, k, v, inverse, attention, scales, decays), tiles, barriers, parts, key_column, value_column,
                      HV, L, STAGES)),
        ],
        [1],
        [40],
    )  # fmt: skip


@gluon.jit
def _carry(
    tiles, output_tile, output, p_output, barriers, parts, states, i_column, value_column, HV: gl.constexpr,
    DK: gl.constexpr, DV: gl.constexpr, BV: gl.constexpr, L: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """S^T from chunk to chunk, and what the tokens write."""
    q_tiles, k_tiles, v_tiles, inverse_tiles, attention_tiles, scale_tiles, decay_tiles = tiles
    ready, free = barriers
    p_cu_parts, p_first_chunk, first_part, last_part, i_head = parts
    p_initial, p_final, p_targets, slot, initial_stride, final_stride, p_first_part = states
    dtype: gl.constexpr = k_tiles.dtype
    of_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DK, 16])
    of_chunk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    left_of_state: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    left_of_chunk: gl.constexpr = gl.DotOperandLayout(0, of_chunk, 2)
    by_token: gl.constexpr = gl.SliceLayout(0, of_chunk)
    four: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
    zeros = gl.zeros([BV, L], gl.float32, layout=of_chunk)

    o_column = i_column * BV + gl.arange(0, BV, layout=gl.SliceLayout(1, of_state))
    o_k = gl.arange(0, DK, layout=gl.SliceLayout(0, of_state))
    o_state = i_head * (DK * DV) + o_k[None, :] * DV + o_column[:, None]
    b_state = gl.zeros([BV, DK], gl.float32, layout=of_state)
    if p_initial is not None:
        b_state += gl.load(p_initial + slot.to(gl.int64) * initial_stride + o_state).to(gl.float32)
    used = 0
    for i_part in range(first_part, last_part):
        begin, length, chunks, system = _part(p_cu_parts, p_first_chunk, i_part, i_head, HV, L)
        b_left = gl.convert_layout(b_state.to(dtype), left_of_chunk)
        b_leaving = zeros.to(dtype)
        for number in range(chunks):
            stage = used % STAGES
            token, count = begin + number * L, length - number * L
            k_tile, v_tile, scale = k_tiles.index(stage), v_tiles.index(stage), scale_tiles.index(stage)
            mbarrier.wait(ready.index(stage), used // STAGES & 1)
            _clear(k_tile, v_tile, count)
            b_read = warpgroup_mma(b_left, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
            if number > 0:
                _leave(b_leaving, output_tile, output, p_output, token - L, L, value_column, HV * DV, L, BV)
                mbarrier.arrive(free.index((used + STAGES - 1) % STAGES), count=1)
            b_q = q_tiles.index(stage).permute((1, 0))
            b_output = warpgroup_mma(b_left, b_q, zeros, use_acc=False, is_async=True)
            beta, survived = scale.slice(0, L).load(by_token), scale.slice(L, L).load(by_token)
            b_value = v_tile.permute((1, 0)).load(of_chunk).to(gl.float32) * beta[None, :]
            survived *= beta
            b_read = warpgroup_mma_wait(1, deps=[b_read])
            b_error = gl.convert_layout((b_value - survived[None, :] * b_read).to(dtype), left_of_chunk)
            b_inverse = inverse_tiles.index(stage).permute((1, 0))
            b_written = warpgroup_mma(b_error, b_inverse, zeros, use_acc=False, is_async=True)
            left, q_scale = scale.slice(2 * L, L).load(by_token), scale.slice(3 * L, L).load(by_token)
            b_decays = decay_tiles.index(stage).slice(0, 4).load(four)
            is_decay = gl.arange(0, 4, layout=four) == (system + number * HV) % 4
            b_state *= gl.sum(gl.where(is_decay, b_decays, 0.0), axis=0)
            b_written, b_output = warpgroup_mma_wait(0, deps=[b_written, b_output])
            b_faded = gl.convert_layout((b_written * left[None, :]).to(dtype), left_of_state)
            b_state = warpgroup_mma(b_faded, k_tile, b_state, is_async=True)
            b_output *= q_scale[None, :]
            b_written = gl.convert_layout(b_written.to(dtype), left_of_chunk)
            b_attention = attention_tiles.index(stage).permute((1, 0))
            b_output = warpgroup_mma(b_written, b_attention, b_output, is_async=True)
            b_state = warpgroup_mma_wait(1, deps=[b_state])
            b_left = gl.convert_layout(b_state.to(dtype), left_of_chunk)
            b_leaving = warpgroup_mma_wait(0, deps=[b_output]).to(dtype)
            used += 1
        if chunks > 0:
            token = begin + (chunks - 1) * L
            count = length - (chunks - 1) * L
            _leave(b_leaving, output_tile, output, p_output, token, count, value_column, HV * DV, L, BV)
            mbarrier.arrive(free.index((used + STAGES - 1) % STAGES), count=1)
        if p_targets is None:
            gl.store(p_final + i_part.to(gl.int64) * final_stride + o_state, b_state.to(p_final.dtype.element_ty))
        elif p_first_part is not None or length > 0:
            p_target = p_final + gl.load(p_targets + i_part).to(gl.int64) * final_stride
            gl.store(p_target + o_state, b_state.to(p_final.dtype.element_ty))
    tma.store_wait(0)


@gluon.jit
def _clear(k_tile, v_tile, count):
    """Zero what follows the part: it is not its own, and 0 times it could be NaN."""
    L: gl.constexpr = k_tile.shape[0]
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if count < L:
        is_token = (gl.arange(0, L, layout=gl.SliceLayout(1, rows)) < count)[:, None]
        for i in gl.static_range(k_tile.shape[1] // 64):
            columns = k_tile.slice(i * 64, 64, dim=1)
            b_k = columns.load(rows)
            columns.store(gl.where(is_token, b_k, gl.zeros_like(b_k)))
        b_v = v_tile.load(rows)
        v_tile.store(gl.where(is_token, b_v, gl.zeros_like(b_v)))
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def _leave(
    b_leaving, tile, output, p_output, token, count, column, ROW: gl.constexpr, L: gl.constexpr, BV: gl.constexpr
):
    """Write the outputs of a chunk, which come transposed as the state is. All warps are done with the chunk then."""
    tma.store_wait(0)
    gl.thread_barrier()
    tile.permute((1, 0)).store(b_leaving)
    fence_async_shared()
    gl.thread_barrier()
    if count >= L:
        tma.async_copy_shared_to_global(output, [token, column], tile)
    else:
        rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        o_row = gl.arange(0, L, layout=gl.SliceLayout(1, rows))[:, None]
        o_column = gl.arange(0, BV, layout=gl.SliceLayout(0, rows))[None, :]
        p_row = p_output + token.to(gl.int64) * ROW + column
        gl.store(p_row + (o_row * ROW + o_column), tile.load(rows), (o_row < count) & (o_column < BV))


@gluon.jit
def _fetch(
    sources, tiles, barriers, parts, key_column, value_column,
    HV: gl.constexpr, L: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The tiles of each chunk, STAGES chunks ahead of their last use."""
    q, k, v, inverse, attention, scales, decays = sources
    q_tiles, k_tiles, v_tiles, inverse_tiles, attention_tiles, scale_tiles, decay_tiles = tiles
    ready, free = barriers
    p_cu_parts, p_first_chunk, first_part, last_part, i_head = parts
    values: gl.constexpr = q.block_type.nbytes + k.block_type.nbytes + v.block_type.nbytes
    squares: gl.constexpr = inverse.block_type.nbytes + attention.block_type.nbytes
    used = 0
    for i_part in range(first_part, last_part):
        begin, _length, chunks, system = _part(p_cu_parts, p_first_chunk, i_part, i_head, HV, L)
        for number in range(chunks):
            stage = used % STAGES
            token, i_system = begin + number * L, system + number * HV
            mbarrier.wait(free.index(stage), (used // STAGES + 1) & 1)
            at = ready.index(stage)
            mbarrier.expect(at, values + squares + scales.block_type.nbytes + decays.block_type.nbytes)
            tma.async_copy_global_to_shared(k, [token, key_column], at, k_tiles.index(stage))
            tma.async_copy_global_to_shared(v, [token, value_column], at, v_tiles.index(stage))
            tma.async_copy_global_to_shared(scales, [i_system * (4 * L)], at, scale_tiles.index(stage))
            # A copy starts at a multiple of 16 bytes.
            tma.async_copy_global_to_shared(decays, [i_system // 4 * 4], at, decay_tiles.index(stage))
            tma.async_copy_global_to_shared(inverse, [i_system * L, 0], at, inverse_tiles.index(stage))
            tma.async_copy_global_to_shared(q, [token, key_column], at, q_tiles.index(stage))
            tma.async_copy_global_to_shared(attention, [i_system * L, 0], at, attention_tiles.index(stage))
            used += 1


@gluon.jit
def _part(p_cu_parts, p_first_chunk, i_part, i_head, HV: gl.constexpr, L: gl.constexpr):
    """First token, tokens and chunks of a part, and the system of its first chunk."""
    begin = gl.load(p_cu_parts + i_part)
    length = gl.load(p_cu_parts + i_part + 1) - begin
    return begin, length, (length + (L - 1)) // L, gl.load(p_first_chunk + i_part) * HV + i_head

"""The walk over the chunks of the gated delta rule on Hopper GPUs; gated_delta_chunk_triton.py launches the kernel.

For heads of 64 or 128 channels in 16 bits, and written in Gluon, Triton's language below its compiler's choices. A
program has three groups of warps that hand each other tiles in shared memory: one fetches what the next chunks need,
one carries S^T from chunk to chunk (registers are both result and left operand of the tensor cores, so that its chain
of three products leaves them only to be read by the third group), and one finds the outputs. In the names of
docs/gated_delta_rule.md; equations 3 to 5.

Barriers come in pairs, and each side counts the chunks: `ready` / `free` for the tiles of a stage, `handed` / `taken`
for the state that enters a chunk (0) and for what its tokens write (1).
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


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
    entering_tile = gl.allocate_shared_memory(dtype, [BV, DK], k.layout)
    written_tile = gl.allocate_shared_memory(dtype, [BV, L], v.layout)
    output_tile = gl.allocate_shared_memory(dtype, [L, BV], output.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    handed = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(handed.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    if p_slots is None:
        slot = i_sequence
    else:
        slot = gl.load(p_slots + i_sequence)
    if p_first_part is None:
        first_part, last_part = i_sequence, i_sequence + 1
    else:
        first_part, last_part = gl.load(p_first_part + i_sequence), gl.load(p_first_part + i_sequence + 1)
    barriers = (ready, free, handed, taken)
    parts = (p_cu_parts, p_first_chunk, first_part, last_part, i_head)
    states = (p_initial, p_final, p_targets, slot, initial_stride, final_stride, p_first_part)
    gl.warp_specialize(
        [
            (_carry, (tiles, entering_tile, written_tile, barriers, parts, states, i_column,
                      HV, DK, DV, BV, L, STAGES)),
            (_read, (tiles, entering_tile, written_tile, output_tile, output, p_output, barriers, parts, value_column,
                     HV, DV, BV, L, STAGES)),
            (_fetch, ((q, k, v, inverse, attention, scales, decays), tiles, barriers, parts, key_column, value_column,
                      HV, L, STAGES)),
        ],
        [4, 1],
        [112, 40],
    )  # fmt: skip


@gluon.jit
def _carry(
    tiles, entering_tile, written_tile, barriers, parts, states, i_column, HV: gl.constexpr, DK: gl.constexpr,
    DV: gl.constexpr, BV: gl.constexpr, L: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """S^T from chunk to chunk, and what the tokens write."""
    k_tiles, v_tiles, inverse_tiles, scale_tiles, decay_tiles = tiles[1], tiles[2], tiles[3], tiles[5], tiles[6]
    ready, free, handed, taken = barriers
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
        for number in range(chunks):
            stage = used % STAGES
            k_tile, v_tile, scale = k_tiles.index(stage), v_tiles.index(stage), scale_tiles.index(stage)
            b_entering = b_state.to(dtype)
            b_left = gl.convert_layout(b_entering, left_of_chunk)
            mbarrier.wait(ready.index(stage), used // STAGES & 1)
            _clear(k_tile, v_tile, length - number * L)
            b_read = warpgroup_mma(b_left, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
            # While the tensor cores are busy with what is next on the chain, the others get their copy.
            mbarrier.wait(taken.index(0), (used + 1) & 1)
            entering_tile.store(b_entering)
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(handed.index(0), count=1)
            if used > 0:
                mbarrier.arrive(free.index((used + STAGES - 1) % STAGES), count=1)
            beta, survived = scale.slice(0, L).load(by_token), scale.slice(L, L).load(by_token)
            b_value = v_tile.permute((1, 0)).load(of_chunk).to(gl.float32) * beta[None, :]
            survived *= beta
            b_read = warpgroup_mma_wait(0, deps=[b_read])
            b_error = gl.convert_layout((b_value - survived[None, :] * b_read).to(dtype), left_of_chunk)
            b_inverse = inverse_tiles.index(stage).permute((1, 0))
            b_written = warpgroup_mma(b_error, b_inverse, zeros, use_acc=False, is_async=True)
            left = scale.slice(2 * L, L).load(by_token)
            b_decays = decay_tiles.index(stage).slice(0, 4).load(four)
            is_decay = gl.arange(0, 4, layout=four) == (system + number * HV) % 4
            b_state *= gl.sum(gl.where(is_decay, b_decays, 0.0), axis=0)
            b_written = warpgroup_mma_wait(0, deps=[b_written])
            b_faded = gl.convert_layout((b_written * left[None, :]).to(dtype), left_of_state)
            b_state = warpgroup_mma(b_faded, k_tile, b_state, is_async=True)
            mbarrier.wait(taken.index(1), (used + 1) & 1)
            written_tile.store(b_written.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(handed.index(1), count=1)
            b_state = warpgroup_mma_wait(0, deps=[b_state])
            used += 1
        if p_targets is None:
            gl.store(p_final + i_part.to(gl.int64) * final_stride + o_state, b_state.to(p_final.dtype.element_ty))
        elif p_first_part is not None or length > 0:
            p_target = p_final + gl.load(p_targets + i_part).to(gl.int64) * final_stride
            gl.store(p_target + o_state, b_state.to(p_final.dtype.element_ty))


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
def _read(
    tiles, entering_tile, written_tile, output_tile, output, p_output, barriers, parts, value_column,
    HV: gl.constexpr, DV: gl.constexpr, BV: gl.constexpr, L: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The outputs, transposed as the state is, until they are left in memory."""
    ROW: gl.constexpr = HV * DV
    q_tiles, attention_tiles, scale_tiles = tiles[0], tiles[4], tiles[5]
    ready, free, handed, taken = barriers
    p_cu_parts, p_first_chunk, first_part, last_part, i_head = parts
    of_chunk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    zeros = gl.zeros([BV, L], gl.float32, layout=of_chunk)
    used = 0
    for i_part in range(first_part, last_part):
        begin, length, chunks, system = _part(p_cu_parts, p_first_chunk, i_part, i_head, HV, L)
        for number in range(chunks):
            stage = used % STAGES
            token, count = begin + number * L, length - number * L
            mbarrier.wait(ready.index(stage), used // STAGES & 1)
            mbarrier.wait(handed.index(0), used & 1)
            b_q = q_tiles.index(stage).permute((1, 0))
            b_output = warpgroup_mma(entering_tile, b_q, zeros, use_acc=False, is_async=True)
            q_scale = scale_tiles.index(stage).slice(3 * L, L).load(gl.SliceLayout(0, of_chunk))
            b_output = warpgroup_mma_wait(0, deps=[b_output])
            gl.thread_barrier()
            mbarrier.arrive(taken.index(0), count=1)
            b_output *= q_scale[None, :]
            mbarrier.wait(handed.index(1), used & 1)
            b_attention = attention_tiles.index(stage).permute((1, 0))
            b_output = warpgroup_mma(written_tile, b_attention, b_output, is_async=True)
            b_output = warpgroup_mma_wait(0, deps=[b_output])
            tma.store_wait(0)
            gl.thread_barrier()
            mbarrier.arrive(taken.index(1), count=1)
            mbarrier.arrive(free.index(stage), count=1)
            output_tile.permute((1, 0)).store(b_output.to(output.dtype))
            fence_async_shared()
            gl.thread_barrier()
            if count >= L:
                tma.async_copy_shared_to_global(output, [token, value_column], output_tile)
            else:
                o_row = gl.arange(0, L, layout=gl.SliceLayout(1, rows))[:, None]
                o_column = gl.arange(0, BV, layout=gl.SliceLayout(0, rows))[None, :]
                p_row = p_output + token.to(gl.int64) * ROW + value_column
                is_output = (o_row < count) & (o_column < BV)
                gl.store(p_row + (o_row * ROW + o_column), output_tile.load(rows), is_output)
            used += 1
    tma.store_wait(0)


@gluon.jit
def _fetch(
    sources, tiles, barriers, parts, key_column, value_column,
    HV: gl.constexpr, L: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The tiles of each chunk, STAGES chunks ahead of their last use."""
    q, k, v, inverse, attention, scales, decays = sources
    q_tiles, k_tiles, v_tiles, inverse_tiles, attention_tiles, scale_tiles, decay_tiles = tiles
    ready, free = barriers[0], barriers[1]
    p_cu_parts, p_first_chunk, first_part, last_part, i_head = parts
    values: gl.constexpr = q.block_type.nbytes + k.block_type.nbytes + v.block_type.nbytes
    squares: gl.constexpr = inverse.block_type.nbytes + attention.block_type.nbytes
    used = 0
    for i_part in range(first_part, last_part):
        begin, length, chunks, system = _part(p_cu_parts, p_first_chunk, i_part, i_head, HV, L)
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

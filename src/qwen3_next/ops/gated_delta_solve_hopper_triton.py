"""The systems of the gated delta rule's chunks on Hopper GPUs; gated_delta_chunk_triton.py launches the kernel.

For heads of 64 or 128 channels in 16 bits, and written in Gluon, Triton's language below its compiler's choices: tiles
come and go by tensor descriptors, all arithmetic is done where the tensor cores leave their results, and four programs
share a multiprocessor. Equations 3 and 4 of docs/gated_delta_rule.md.
"""
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportReturnType=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit(do_not_specialize=["q_scale"])
def solve_kernel(
    q, k, inverse, attention, p_log_decay, p_beta, p_sums, p_rstd_q, p_rstd_k, p_scales, p_decay,
    p_cu_seqlens, p_first_chunk, p_sequences, q_scale,
    HK: gl.constexpr, HV: gl.constexpr, DK: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """One chunk of one value head. Rows beyond its sequence are read, but nothing of theirs is used."""
    dtype: gl.constexpr = k.dtype
    of_chunk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    by_line: gl.constexpr = gl.SliceLayout(1, of_chunk)
    by_other: gl.constexpr = gl.SliceLayout(0, of_chunk)
    flat: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([L, L], gl.float16)
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])

    i_system = gl.program_id(0)
    i_head, i_chunk = i_system % HV, i_system // HV
    i_key = i_head // (HV // HK)
    i_sequence = gl.load(p_sequences + i_chunk)
    token = gl.load(p_cu_seqlens + i_sequence) + (i_chunk - gl.load(p_first_chunk + i_sequence)) * L
    count = gl.load(p_cu_seqlens + i_sequence + 1) - token

    q_tile = gl.allocate_shared_memory(dtype, q.block_type.shape, q.layout)
    k_tile = gl.allocate_shared_memory(dtype, k.block_type.shape, k.layout)
    system_tile = gl.allocate_shared_memory(gl.float16, [L, L], square)
    solved_tile = gl.allocate_shared_memory(gl.float16, [L, L], square)
    high_tile = gl.allocate_shared_memory(gl.float32, [L], vector)
    low_tile = gl.allocate_shared_memory(gl.float32, [L], vector)
    beta_tile = gl.allocate_shared_memory(gl.float32, [L], vector)
    rstd_q_tile = gl.allocate_shared_memory(gl.float32, [L], vector)
    rstd_k_tile = gl.allocate_shared_memory(gl.float32, [L], vector)
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.expect(ready, q.block_type.nbytes + k.block_type.nbytes)
    tma.async_copy_global_to_shared(k, [token, i_key * DK], ready, k_tile)
    tma.async_copy_global_to_shared(q, [token, i_key * DK], ready, q_tile)

    o_row = gl.arange(0, L, layout=flat)
    valid = o_row < count
    row = token.to(gl.int64) + o_row
    log_decay = gl.load(p_log_decay + row * HV + i_head, valid, other=0.0)
    beta = gl.load(p_beta + row * HV + i_head, valid, other=0.0).to(gl.float32)
    sums = gl.associative_scan(log_decay.to(gl.float64), 0, _plus)
    # Sums reach -1000s: as two fp32 numbers each, their differences keep the precision of the single terms.
    high = sums.to(gl.float32)
    high_tile.store(high)
    low_tile.store((sums - high.to(gl.float64)).to(gl.float32))
    beta_tile.store(beta)

    mbarrier.wait(ready, 0)
    zeros = gl.zeros([L, L], gl.float32, layout=of_chunk)
    b_products = warpgroup_mma(k_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    squares = gl.zeros([L], gl.float32, layout=gl.SliceLayout(1, rows))
    for part in gl.static_range(DK // 64):
        b_q = q_tile.slice(part * 64, 64, dim=1).load(rows).to(gl.float32)
        squares += gl.sum(b_q * b_q, axis=1)
    rstd_q_tile.store(gl.rsqrt(squares + 1e-6) * q_scale)
    i_line, i_other = gl.arange(0, L, layout=by_line)[:, None], gl.arange(0, L, layout=by_other)[None, :]
    differences = high_tile.load(by_line)[:, None] - high_tile.load(by_other)[None, :]
    differences += low_tile.load(by_line)[:, None] - low_tile.load(by_other)[None, :]
    is_before = (i_line >= i_other) & (i_line < count)
    b_ratios = gl.exp(gl.where(is_before, differences, float("-inf")))
    b_products = warpgroup_mma_wait(0, deps=[b_products])
    rstd_k = gl.rsqrt(gl.sum(gl.where(i_line == i_other, b_products, 0.0), axis=1) + 1e-6)
    rstd_k_tile.store(rstd_k)
    b_reads = warpgroup_mma(q_tile, k_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    b_ratios *= rstd_k_tile.load(by_other)[None, :]
    b_system = b_ratios * b_products * (rstd_k * beta_tile.load(by_line))[:, None]
    b_system = gl.where((i_line > i_other) & is_before, b_system, 0.0)
    # No entry of the inverse is above 1, so that fp16 has two digits more for its factors than bf16 for the result.
    system_tile.store(b_system.to(gl.float16))
    b_inverse = gl.where(i_line == i_other, 1.0, gl.where(i_line // 2 == i_other // 2, -b_system, 0.0))
    b_reads = warpgroup_mma_wait(0, deps=[b_reads])
    b_attention = gl.where(is_before, b_ratios * b_reads * rstd_q_tile.load(by_line)[:, None], 0.0)
    _leave(attention, q_tile, b_attention, i_system * L)
    b_inverse = _invert(b_inverse, system_tile, solved_tile, i_line, i_other, L)
    _leave(inverse, k_tile, b_inverse, i_system * L)

    # Last, because the fences before products are full memory barriers, which wait for stores.
    last = gl.sum(gl.where(o_row == L - 1, sums, 0.0), axis=0)
    survived, left = gl.exp(high), gl.exp((last - sums).to(gl.float32))
    rstd_q, rstd_k = rstd_q_tile.load(flat), rstd_k_tile.load(flat)
    p_scale = p_scales + i_system.to(gl.int64) * (4 * L) + o_row
    gl.store(p_scale, beta)
    gl.store(p_scale + L, gl.where(valid, survived * rstd_k, 0.0))
    gl.store(p_scale + 2 * L, gl.where(valid, left * rstd_k, 0.0))
    gl.store(p_scale + 3 * L, gl.where(valid, survived * rstd_q, 0.0))
    gl.store(p_decay + i_system, gl.exp(last.to(gl.float32)))
    gl.store(p_sums + row * HV + i_head, sums, valid)
    if i_head % (HV // HK) == 0:
        gl.store(p_rstd_q + row * HK + i_key, rstd_q, valid)
        gl.store(p_rstd_k + row * HK + i_key, rstd_k, valid)
    tma.store_wait(0)


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit
def _invert(b_inverse, system_tile, solved_tile, i_line, i_other, L: gl.constexpr):
    """(I + system)^-1, given that of its diagonal blocks of 2: pairs of blocks, then pairs of pairs.

    With D the inverse of the diagonal blocks and C what is below them within a pair, the pair's inverse is D - D C D:
    substitution by blocks, exact after one step for any keys, unlike a series of powers. As D has nothing outside its
    blocks, D C D is that part of D (the whole system) D.
    """
    of_chunk: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, L, 16])
    left_operand: gl.constexpr = gl.DotOperandLayout(0, of_chunk, 2)
    zeros = gl.zeros([L, L], gl.float32, layout=of_chunk)
    for level in gl.static_range(1, 6):
        b_solved = b_inverse.to(gl.float16)
        solved_tile.store(b_solved)
        fence_async_shared()
        gl.thread_barrier()
        b_solved = gl.convert_layout(b_solved, left_operand)
        b_below = warpgroup_mma(b_solved, system_tile, zeros, use_acc=False, is_async=True)
        b_below = warpgroup_mma_wait(0, deps=[b_below])
        b_below = gl.convert_layout(b_below.to(gl.float16), left_operand)
        b_below = warpgroup_mma(b_below, solved_tile, zeros, use_acc=False, is_async=True)
        b_below = warpgroup_mma_wait(0, deps=[b_below])
        is_pair = i_line // (2 << level) == i_other // (2 << level)
        b_inverse -= gl.where(is_pair & (i_line // (1 << level) > i_other // (1 << level)), b_below, 0.0)
        gl.thread_barrier()
    return b_inverse


@gluon.jit
def _leave(square, tile, b_square, row):
    """Write a matrix by way of a tile that has had its use."""
    tile = tile._reinterpret(square.dtype, square.block_type.shape, square.layout)
    tile.store(b_square.to(square.dtype))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(square, [row, 0], tile)

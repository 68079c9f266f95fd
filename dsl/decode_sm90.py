"""Dense paged split-KV MLA decode for sm_90a: TMA page loads, wgmma, a persistent walk of the schedule.

A CTA of three warpgroups walks the requests of one part of the schedule, for one tile of 64 query rows and one KV head:

- the score warpgroup multiplies Q (seven of its nine 64-column slices live in registers) with a page, takes the
  online softmax and hands P over through the rope columns of the page's stage, which are dead by then;
- two output warpgroups multiply P with the left and the right 256 columns of the page and hold the output tile;
- one warp of the right output warpgroup issues every TMA load, three items ahead.

An *item* is what one stage of the ring holds: the Q tile of a request, then its pages, then the Q tile of the next
request, so that the next request is loading while the last one is written out.  The 512 latent columns of an item go
through a ring of three slots, its 64 rope columns through a ring of two: that is what 227 KB hold beside the tail of Q.
P of block i is announced only when the scores of block i + 1 are nearly done, so that the tensor cores have the
product P V to work on while the score warpgroup is in its softmax.
"""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl.attention import (
    RUNNING_MAX_START,
    advance_max,
    final_lse,
    inverse_sum,
    is_visible,
    mask_score,
    needs_mask,
    page_index,
    partial_lse_log2,
    probability,
    rescale_factor,
)
from tilemla.dsl.combine_sm90 import make_combine
from tilemla.dsl.program import Program
from tilemla.dsl.schedule import end_block, first_block, is_split, read_part, split_slot

ROWS = 64  # rows of a query tile: the M of wgmma
NUM_STAGES = 3
K_STEP = 16  # the K of wgmma on 16-bit operands
SLICE = 64  # columns of one 128-byte swizzle atom
THIRD = 192  # columns that share a barrier: the scores start when the first third of a page is there
Q_STEPS_IN_REGISTERS = 31  # of 36; the next one and the rope columns stay in shared memory
NUM_K_STEPS = 36
A_REGISTERS = 4  # of an m64k16 operand that a thread holds
SCORES = 32  # of a 64x64 accumulator that a thread holds
HALF = 256  # output columns of one warpgroup
SCORE_THREADS = 128
NUM_THREADS = 384
LOAD_THREADS = range(256, 288)  # the warp that issues the TMA loads
# Registers a thread; the three sum to what 384 threads start with. 160 is the least that holds a 64x256 accumulator,
# and the score warpgroup holds 124 of Q.
SCORE_REGISTERS, OUTPUT_REGISTERS = 184, 160
SCORE_BARRIER, LEFT_BARRIER, RIGHT_BARRIER = 1, 2, 3  # named barriers; 0 is __syncthreads

GROUPS_LEFT = 1
ATOM_BYTES = ROWS * SLICE * 2
STAGE_BYTES = 9 * ATOM_BYTES

# The load cursor of the loading warp: the next item to load.
REQUEST, BLOCK, END, PAGE = range(4)

# The schedule is written by hand, and every index is in bounds by construction (rows are guarded where they are stored).
PASS_CONFIG = {
    "tl.disable_warp_specialized": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_data_race_check": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.enable_fast_math": True,
    "tl.ptxas_register_usage_level": 0,
}


def make_decode_program(spec) -> Program:
    """Make the split-KV decode and combine kernels of a spec.

    Parameters
    ----------
    spec : KernelSpec
        Of architecture ``"sm_90a"``.

    Returns
    -------
    Program
        ``mla_decode``, of the parameters that ``tilemla.dsl.make_programs`` lists.
    """
    dtype, accum = spec.dtype, "float32"
    abbreviation = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    block_n, dv, d = spec.page_block_size, spec.head_dim_v, spec.head_dim_qk
    b, h_k, rows, num_blocks, max_blocks, num_sm_parts, len_num_splits, max_splits = T.dynamic(
        "b, h_k, rows, num_blocks, max_blocks, num_sm_parts, len_num_splits, max_splits"
    )
    q_b, q_h, q_r, kv_p, kv_t, kv_h, table_b = T.dynamic("q_b, q_h, q_r, kv_p, kv_t, kv_h, table_b")

    sizes = SimpleNamespace(batch_size=b, num_heads_k=h_k, rows=rows)
    combine = make_combine(dv, accum)

    def stage_of(turn):
        return T.if_then_else(turn >= NUM_STAGES, turn - NUM_STAGES, turn)

    def phase_of(turn):
        return T.if_then_else(turn >= NUM_STAGES, 1, 0)

    def next_turn(turn):
        return T.if_then_else(turn == 2 * NUM_STAGES - 1, 0, turn + 1)

    @T.macro
    def seek(cursor, t):
        # to the Q tile of the first request from cursor[REQUEST] on that has blocks
        cursor[BLOCK] = -1
        cursor[END] = 0
        while (cursor[REQUEST] <= t.part.end_request_inclusive) & (cursor[END] == 0):
            end = end_block(t.part, cursor[REQUEST], t.cache_seqlens[cursor[REQUEST]], block_n)
            if end > first_block(t.part, cursor[REQUEST]):
                cursor[END] = end
            else:
                cursor[REQUEST] += 1

    @T.macro
    def release(barriers, index, t):
        if t.tx % 32 == 0:
            T.barrier_arrive(barriers[index])

    @T.macro
    def load(s, parity, cursor, t):
        if cursor[REQUEST] <= t.part.end_request_inclusive:
            T.barrier_wait(t.empty[s], parity)
            if cursor[BLOCK] < 0:
                for third in T.unroll(3):
                    T.tma_copy(
                        t.q[cursor[REQUEST], t.head, t.row0 : t.row0 + ROWS, third * THIRD : third * THIRD + THIRD],
                        t.kv[s, :, third * THIRD : third * THIRD + THIRD],
                        barrier=t.full[s * 3 + third],
                        leader_scope_threads=32,
                    )
                    release(t.full, s * 3 + third, t)
                cursor[BLOCK] = first_block(t.part, cursor[REQUEST])
                cursor[PAGE] = page_index(t.block_table, cursor[REQUEST], cursor[BLOCK])
            else:
                for third in T.unroll(3):
                    T.tma_copy(
                        t.kcache[cursor[PAGE], 0:block_n, t.head, third * THIRD : third * THIRD + THIRD],
                        t.kv[s, :, third * THIRD : third * THIRD + THIRD],
                        barrier=t.full[s * 3 + third],
                        leader_scope_threads=32,
                    )
                    release(t.full, s * 3 + third, t)
                cursor[BLOCK] += 1
                if cursor[BLOCK] < cursor[END]:
                    cursor[PAGE] = page_index(t.block_table, cursor[REQUEST], cursor[BLOCK])
                else:
                    cursor[REQUEST] += 1
                    seek(cursor, t)

    def key_offset(k_step, stage):
        # of a K step of the page in a stage, in the 16-byte units of a wgmma descriptor
        return stage * (STAGE_BYTES >> 4) + ((k_step // 4 * ATOM_BYTES + k_step % 4 * K_STEP * 2) >> 4)

    @T.macro
    def write_lse(request, row, row_sum, running_max, t):
        if is_split(t.part, request):
            t.lse_accum_log2[split_slot(t.part, request, t.num_splits), t.head, row] = partial_lse_log2(
                row_sum, running_max
            )
        else:
            t.softmax_lse[request, t.head, row] = final_lse(row_sum, running_max)

    @T.macro
    def multiply_registers(scores, q_registers, first, count, keys, stage):
        # scores (+)= Q[:, K steps first .. first + count] @ page.T with Q in registers, as one wgmma group
        T.warpgroup_fence_operand(q_registers, first * A_REGISTERS, count * A_REGISTERS)
        T.warpgroup_fence_operand(scores, 0, SCORES)
        T.warpgroup_arrive()
        for k in T.unroll(count):
            T.ptx_wgmma_rs(
                accum,
                "m64n64k16",
                True,
                abbreviation,
                abbreviation,
                "fp32",
                q_registers.data,
                (first + k) * 2 * A_REGISTERS,
                keys.data,
                key_offset(first + k, stage),
                scores.data,
                0,
                T.Select(first + k != 0, 1, 0),
                1,
                1,
            )
        T.warpgroup_commit_batch()
        T.warpgroup_fence_operand(scores, 0, SCORES)
        T.warpgroup_fence_operand(q_registers, first * A_REGISTERS, count * A_REGISTERS)

    @T.macro
    def multiply_tail(scores, tail, keys, stage):
        # the same with the K steps of Q that are in shared memory
        T.warpgroup_fence_operand(scores, 0, SCORES)
        T.warpgroup_arrive()
        for k in T.unroll(NUM_K_STEPS - Q_STEPS_IN_REGISTERS):
            T.ptx_wgmma_ss(
                accum,
                "m64n64k16",
                True,
                True,
                abbreviation,
                abbreviation,
                "fp32",
                tail.data,
                (k * ROWS * K_STEP * 2) >> 4,
                keys.data,
                key_offset(Q_STEPS_IN_REGISTERS + k, stage),
                scores.data,
                0,
                1,
                1,
                1,
            )
        T.warpgroup_commit_batch()
        T.warpgroup_fence_operand(scores, 0, SCORES)

    @T.macro
    def score_warpgroup(t):
        q_registers = T.alloc_local((Q_STEPS_IN_REGISTERS * 2 * A_REGISTERS,), dtype)
        # What a thread holds of a 64x64 accumulator, in groups of eight columns: two columns of row `row`, then the same
        # two of row `row + 8`. `half` tells the two rows apart.
        scores = T.alloc_local((SCORES,), accum)
        partial = T.alloc_local((2,), accum)
        running_max = T.alloc_local((2,), accum)
        row_sum = T.alloc_local((2,), accum)  # of this thread's columns until the request ends
        alpha = T.alloc_local((2,), accum)
        turn = T.alloc_var("int32", init=0)  # stage + NUM_STAGES * phase
        row = t.tx // 32 * 16 + t.tx % 32 // 4
        column = t.tx % 4 * 2
        # Once, not in the loop: the struct's unused bits would live from one block to the next.
        keys = T.alloc_wgmma_desc()
        tail = T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(keys, T.address_of(t.kv[0, 0, 0]), 1, 1, 64)
        T.initialize_wgmma_descriptor(tail, T.address_of(t.q_tail[0]), 0, 8, 16)

        for request in T.serial(t.part.begin_request, t.part.end_request_inclusive + 1):
            begin = T.alloc_var("int32", init=first_block(t.part, request))
            end = T.alloc_var("int32", init=end_block(t.part, request, t.cache_seqlens[request], block_n))
            for half in T.unroll(2):
                running_max[half] = RUNNING_MAX_START
                row_sum[half] = 0
            if begin < end:
                q_stage = stage_of(turn)
                for third in T.unroll(3):
                    T.barrier_wait(t.full[q_stage * 3 + third], phase_of(turn))
                # A thread's share of an m64k16 operand: pairs at two rows 8 apart and at two columns 8 apart.
                for k in T.unroll(Q_STEPS_IN_REGISTERS):
                    for e in T.unroll(A_REGISTERS):
                        for v in T.vectorized(2):
                            q_registers[(k * A_REGISTERS + e) * 2 + v] = t.kv[
                                q_stage, row + e % 2 * 8, k * K_STEP + e // 2 * 8 + column + v
                            ]
                for k in T.unroll(NUM_K_STEPS - Q_STEPS_IN_REGISTERS):
                    for e in T.unroll(A_REGISTERS):
                        for v in T.vectorized(2):
                            # unswizzled core matrices of 8 rows and 16 bytes, the two of 8 rows side by side
                            t.q_tail[
                                k * ROWS * K_STEP
                                + (t.tx // 32 * 4 + e % 2 * 2 + e // 2) * 64
                                + t.tx % 32 // 4 * 8
                                + column
                                + v
                            ] = t.kv[
                                q_stage, row + e % 2 * 8, (Q_STEPS_IN_REGISTERS + k) * K_STEP + e // 2 * 8 + column + v
                            ]
                T.fence_proxy_async()
                T.sync_threads(SCORE_BARRIER, SCORE_THREADS)
                turn = next_turn(turn)
                for block in T.serial(begin, end):
                    stage = stage_of(turn)
                    phase = phase_of(turn)
                    T.barrier_wait(t.full[stage * 3], phase)
                    multiply_registers(scores, q_registers, 0, 12, keys, stage)
                    T.barrier_wait(t.full[stage * 3 + 1], phase)
                    multiply_registers(scores, q_registers, 12, 12, keys, stage)
                    T.barrier_wait(t.full[stage * 3 + 2], phase)
                    multiply_registers(scores, q_registers, 24, Q_STEPS_IN_REGISTERS - 24, keys, stage)
                    multiply_tail(scores, tail, keys, stage)
                    # What the item before the last one left in alpha and inverse_sum has been read.
                    T.barrier_wait(
                        t.empty[T.if_then_else(stage == 2, 0, stage + 1)], T.if_then_else(stage == 2, phase, phase ^ 1)
                    )
                    T.wait_wgmma(GROUPS_LEFT)
                    release(t.p_full, T.if_then_else(stage == 0, NUM_STAGES - 1, stage - 1), t)
                    T.wait_wgmma(0)
                    # Every warp is through with the rope columns: P may take their place.
                    T.sync_threads(SCORE_BARRIER, SCORE_THREADS)
                    if needs_mask(block, block_n, t.cache_seqlens[request], t.seq_len_q, t.causal):
                        for e in T.unroll(SCORES):
                            visible = is_visible(
                                block * block_n + e // 4 * 8 + column + e % 2,
                                t.cache_seqlens[request],
                                t.row0 + row + e % 4 // 2 * 8,
                                t.group_size,
                                t.seq_len_q,
                                t.causal,
                            )
                            scores[e] = mask_score(scores[e], visible)
                    for half in T.unroll(2):
                        partial[half] = T.max(scores[half * 2], scores[half * 2 + 1])
                    for e in T.unroll(SCORES - 4):
                        partial[e % 4 // 2] = T.max(partial[e % 4 // 2], scores[4 + e])
                    for half in T.unroll(2):
                        partial[half] = T.max(partial[half], T.shfl_xor(partial[half], 1))
                    for half in T.unroll(2):
                        partial[half] = T.max(partial[half], T.shfl_xor(partial[half], 2))
                    for half in T.unroll(2):
                        partial[half] = advance_max(running_max[half], partial[half] * t.softmax_scale_log2)
                        alpha[half] = rescale_factor(running_max[half], partial[half])
                        running_max[half] = partial[half]
                        row_sum[half] = row_sum[half] * alpha[half]
                    if t.tx % 4 == 0:
                        for half in T.unroll(2):
                            t.alpha[block % 2, row + half * 8] = alpha[half]
                    for pair in T.unroll(SCORES // 2):
                        for v in T.unroll(2):
                            scores[pair * 2 + v] = probability(
                                scores[pair * 2 + v], t.softmax_scale_log2, running_max[pair % 2]
                            )
                        row_sum[pair % 2] = row_sum[pair % 2] + (scores[pair * 2] + scores[pair * 2 + 1])
                        for v in T.vectorized(2):
                            t.kv[stage, row + pair % 2 * 8, dv + pair // 2 * 8 + column + v] = scores[pair * 2 + v]
                    if block == end - 1:
                        for half in T.unroll(2):
                            row_sum[half] = row_sum[half] + T.shfl_xor(row_sum[half], 1)
                            row_sum[half] = row_sum[half] + T.shfl_xor(row_sum[half], 2)
                            t.inverse_sum[row + half * 8] = inverse_sum(row_sum[half])
                    T.fence_proxy_async()
                    T.sync_warp()
                    if block == end - 1:
                        release(t.p_full, stage, t)
                    turn = next_turn(turn)
            if t.tx % 4 == 0:
                for half in T.unroll(2):
                    if t.row0 + row + half * 8 < rows:
                        write_lse(request, t.row0 + row + half * 8, row_sum[half], running_max[half], t)

    @T.macro
    def output_warpgroup(acc, cursor, column, barrier_id, t):
        loads = barrier_id == RIGHT_BARRIER
        scale = T.alloc_fragment((ROWS,), accum)
        stage = T.alloc_var("int32", init=0)
        phase = T.alloc_var("int32", init=0)
        if loads:
            if t.tx < LOAD_THREADS.stop:
                cursor[REQUEST] = t.part.begin_request
                seek(cursor, t)
                for i in T.serial(NUM_STAGES):
                    load(i, 1, cursor, t)
        for request in T.serial(t.part.begin_request, t.part.end_request_inclusive + 1):
            begin = T.alloc_var("int32", init=first_block(t.part, request))
            end = T.alloc_var("int32", init=end_block(t.part, request, t.cache_seqlens[request], block_n))
            T.fill(acc, 0)
            if begin < end:
                T.barrier_wait(t.p_full[stage], phase)
                release(t.empty, stage, t)
                if loads:
                    if t.tx < LOAD_THREADS.stop:
                        load(stage, phase, cursor, t)
                stage += 1
                if stage == NUM_STAGES:
                    stage = 0
                    phase = phase ^ 1
                for block in T.serial(begin, end):
                    T.barrier_wait(t.p_full[stage], phase)
                    row = (t.tx % 128) // 32 * 16 + (t.tx % 32) // 4
                    if T.any_sync((t.alpha[block % 2, row] != 1.0) | (t.alpha[block % 2, row + 8] != 1.0)) != 0:
                        for i in T.Parallel(ROWS):
                            scale[i] = t.alpha[block % 2, i]
                        for i, j in T.Parallel(ROWS, HALF):
                            acc[i, j] = acc[i, j] * scale[i]
                    if block == end - 1:
                        if (block + 1) * block_n > t.cache_seqlens[request]:
                            # P is 0 past the end of the sequence, but what lies there may be NaN
                            for i, j in T.Parallel(block_n, HALF):
                                if block * block_n + i >= t.cache_seqlens[request]:
                                    t.kv[stage, i, column + j] = 0
                            T.fence_proxy_async()
                            T.sync_threads(barrier_id, 128)
                    T.wgmma_gemm(t.kv[stage, :, dv:d], t.kv[stage, :, column : column + HALF], acc)
                    T.wait_wgmma(0)
                    if block < end - 1:
                        release(t.empty, stage, t)
                        if loads:
                            if t.tx < LOAD_THREADS.stop:
                                load(stage, phase, cursor, t)
                        stage += 1
                        if stage == NUM_STAGES:
                            stage = 0
                            phase = phase ^ 1
                for i in T.Parallel(ROWS):
                    scale[i] = t.inverse_sum[i]
                for i, j in T.Parallel(ROWS, HALF):
                    acc[i, j] = acc[i, j] * scale[i]
            row0 = T.alloc_var("int32", init=t.tile[0])
            head = T.alloc_var("int32", init=t.tile[1])
            if is_split(t.part, request):
                slot = T.alloc_var("int32", init=split_slot(t.part, request, t.num_splits))
                for i, j in T.Parallel(ROWS, HALF):
                    if row0 + i < rows:
                        t.out_accum[slot, head, row0 + i, column + j] = acc[i, j]
            else:
                if begin < end:
                    # the slot of the last page has been read: it carries the tile to the TMA store before it is refilled
                    T.copy(acc, t.kv[stage, :, column : column + HALF])
                    T.fence_proxy_async()
                    T.sync_threads(barrier_id, 128)
                    if t.tx % 128 < 32:
                        T.tma_copy(
                            t.kv[stage, :, column : column + HALF],
                            t.out[request, head, row0 : row0 + ROWS, column : column + HALF],
                            leader_scope_threads=32,
                        )
                        T.tma_store_wait(0)
                else:
                    for i in T.serial(T.min(ROWS, rows - row0)):
                        for j in T.Parallel(HALF):
                            t.out[request, head, row0 + i, column + j] = 0
            if begin < end:
                T.sync_threads(barrier_id, 128)
                release(t.empty, stage, t)
                if loads:
                    if t.tx < LOAD_THREADS.stop:
                        load(stage, phase, cursor, t)
                stage += 1
                if stage == NUM_STAGES:
                    stage = 0
                    phase = phase ^ 1

    @T.prim_func
    def mla_decode(
        q: T.StridedTensor((b, h_k, rows, d), (q_b, q_h, q_r, 1), dtype),
        kcache: T.StridedTensor((num_blocks, block_n, h_k, d), (kv_p, kv_t, kv_h, 1), dtype),
        block_table: T.StridedTensor((b, max_blocks), (table_b, 1), "int32"),
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, 8), "int32"),
        num_splits: T.Tensor((len_num_splits,), "int32"),
        out: T.Tensor((b, h_k, rows, dv), dtype),
        softmax_lse: T.Tensor((b, h_k, rows), accum),
        out_accum: T.Tensor((max_splits, h_k, rows, dv), accum),
        lse_accum_log2: T.Tensor((max_splits, h_k, rows), accum),
        softmax_scale_log2: T.float32,
        seq_len_q: T.int32,
        group_size: T.int32,
        causal: T.int32,
    ):
        with T.Kernel(T.ceildiv(rows, ROWS), h_k, num_sm_parts, threads=NUM_THREADS) as (tile_index, head, part_index):
            kv = T.alloc_shared((NUM_STAGES, block_n, d), dtype)
            q_tail = T.alloc_shared(((NUM_K_STEPS - Q_STEPS_IN_REGISTERS) * ROWS * K_STEP,), dtype)
            alpha = T.alloc_shared((2, ROWS), accum, scope="shared")
            inverse_sums = T.alloc_shared((ROWS,), accum, scope="shared")
            tile = T.alloc_shared((2,), "int32", scope="shared")
            full = T.alloc_barrier([1] * 3 * NUM_STAGES)
            empty = T.alloc_barrier([8] * NUM_STAGES)
            p_full = T.alloc_barrier([4] * NUM_STAGES)

            tx = T.get_thread_binding()
            row0 = tile_index * ROWS
            part = read_part(tile_scheduler_metadata, part_index)
            # the walk's bounds stay in registers, the rest of the row is read when it is wanted
            begin_request = part.begin_request
            end_request_inclusive = part.end_request_inclusive
            begin_block = part.begin_block
            last_end_block = part.end_block
            T.pdl_trigger()
            if tx == 0:
                tile[0] = row0
                tile[1] = head
            T.sync_threads()
            t = SimpleNamespace(
                q=q,
                kcache=kcache,
                block_table=block_table,
                cache_seqlens=cache_seqlens,
                num_splits=num_splits,
                out=out,
                softmax_lse=softmax_lse,
                out_accum=out_accum,
                lse_accum_log2=lse_accum_log2,
                softmax_scale_log2=softmax_scale_log2,
                causal=causal,
                kv=kv,
                q_tail=q_tail,
                alpha=alpha,
                inverse_sum=inverse_sums,
                tile=tile,
                full=full,
                empty=empty,
                p_full=p_full,
                tx=tx,
                row0=row0,
                head=head,
                group_size=group_size,
                seq_len_q=seq_len_q,
                part=part._replace(
                    begin_request=begin_request,
                    end_request_inclusive=end_request_inclusive,
                    begin_block=begin_block,
                    end_block=last_end_block,
                ),
            )
            if tx < SCORE_THREADS:
                T.set_max_nreg(SCORE_REGISTERS, 1)
                score_warpgroup(t)
            elif tx < 256:
                T.set_max_nreg(OUTPUT_REGISTERS, 0)
                left = T.alloc_fragment((ROWS, HALF), accum)
                no_cursor = T.alloc_local((1,), "int32")
                output_warpgroup(left, no_cursor, 0, LEFT_BARRIER, t)
            else:
                T.set_max_nreg(OUTPUT_REGISTERS, 0)
                right = T.alloc_fragment((ROWS, HALF), accum)
                cursor = T.alloc_local((4,), "int32")
                output_warpgroup(right, cursor, HALF, RIGHT_BARRIER, t)

        combine(out_accum, lse_accum_log2, num_splits, out, softmax_lse, sizes)

    return Program(func=mla_decode, pass_config=PASS_CONFIG, pdl=("mla_decode_kernel_1",))

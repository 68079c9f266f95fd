"""The score warpgroup: S = Q K^T, the online softmax, and P for the output warpgroups."""

from typing import Any

import tilelang.language as T

from tilemla.config import KernelConfig
from tilemla.dsl.attention import (
    RUNNING_MAX_START,
    advance_max,
    end_key_of_query,
    final_lse,
    first_key_of_query,
    inverse_sum,
    mask_score,
    needs_mask,
    partial_lse_log2,
    probability,
    rescale_factor,
    sink_share,
)
from tilemla.dsl.schedule import BLOCK_N, is_split, split_slot
from tilemla.dsl.sm90.tile import (
    A_REGISTERS,
    ATOM_BYTES,
    K_STEP,
    NUM_STAGES,
    NUM_THIRDS,
    Q_STEPS_IN_REGISTERS,
    ROWS,
    SCORE_BARRIER,
    SCORES,
    SLICE,
    STAGE_COLUMNS,
    WARPGROUP,
    arrive_warp,
    begin_and_end,
    columns_of_thirds,
    next_turn,
    phase_of,
    stage_of,
)


def make_score_warpgroup(dtype: str, head_dim_qk: int, head_dim_v: int, config: KernelConfig) -> Any:
    """Make the macro ``score_warpgroup(t)``.

    wgmma is issued by hand, since the last 16 latent columns of Q are multiplied from shared memory and the rest from
    registers, which a tile-level gemm would answer with another layout of the pages. A thread therefore sees its own
    elements of the 64x64 accumulator: groups of eight columns, of each two neighbouring columns of row `row` and the
    same two of row `row + 8`. `half` tells these rows apart.

    Parameters
    ----------
    dtype : str
        Of queries and cache.
    head_dim_qk, head_dim_v : int
        Columns of a key and of a value.
    config : KernelConfig
        Its ``groups_left_at_handover``.
    """
    operand = {"bfloat16": "bf16", "float16": "fp16"}[dtype]
    accum = "float32"
    num_k_steps = head_dim_qk // K_STEP
    num_tail_steps = num_k_steps - Q_STEPS_IN_REGISTERS
    # Of each third of an item, its number and the K steps of it that are multiplied from registers: first and count.
    thirds = [
        (i, first // K_STEP, min(width // K_STEP, Q_STEPS_IN_REGISTERS - first // K_STEP))
        for i, first, width in columns_of_thirds(head_dim_qk)
    ]
    stage_bytes = STAGE_COLUMNS // SLICE * ATOM_BYTES

    def key_offset(k_step, stage):
        # of a K step of the page in a stage, in the 16-byte units of a wgmma descriptor
        steps_per_atom = SLICE // K_STEP
        return stage * (stage_bytes >> 4) + (
            (k_step // steps_per_atom * ATOM_BYTES + k_step % steps_per_atom * K_STEP * 2) >> 4
        )

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
                operand,
                operand,
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
        for k in T.unroll(num_tail_steps):
            T.ptx_wgmma_ss(
                accum,
                "m64n64k16",
                True,
                True,
                operand,
                operand,
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
    def take_q(q_registers, stage, row, column, t):
        # A thread's share of an m64k16 operand: pairs at two rows 8 apart and at two columns 8 apart.
        for k in T.unroll(Q_STEPS_IN_REGISTERS):
            for e in T.unroll(A_REGISTERS):
                for v in T.vectorized(2):
                    q_registers[(k * A_REGISTERS + e) * 2 + v] = t.kv[
                        stage, row + e % 2 * 8, k * K_STEP + e // 2 * 8 + column + v
                    ]
        for k in T.unroll(num_tail_steps):
            for e in T.unroll(A_REGISTERS):
                for v in T.vectorized(2):
                    # unswizzled core matrices of 8 rows and 16 bytes, the two of the same 8 rows side by side
                    t.q_tail[
                        k * ROWS * K_STEP + (t.tx // 32 * 4 + e % 2 * 2 + e // 2) * 64 + t.tx % 32 // 4 * 8 + column + v
                    ] = t.kv[stage, row + e % 2 * 8, (Q_STEPS_IN_REGISTERS + k) * K_STEP + e // 2 * 8 + column + v]
        T.fence_proxy_async()
        T.sync_threads(SCORE_BARRIER, WARPGROUP)

    @T.macro
    def soften(scores, running_max, row_sum, request, block, stage, row, column, t):
        # Scores to P in the stage's rope columns, with the step on maximum and sum, and alpha for the accumulators.
        block_max = T.alloc_local((4,), accum)
        alpha = T.alloc_local((2,), accum)
        if needs_mask(block, BLOCK_N, t.cache_seqlens[request], t.seq_len_q, t.window_left, t.window_right):
            for half in T.unroll(2):
                # the keys that the row's query sees, counted from this thread's first column
                query = T.alloc_var("int32", init=T.truncdiv(t.tile[0] + row + half * 8, t.group_size))
                shift = T.alloc_var("int32", init=block * BLOCK_N + column)
                first = T.alloc_var(
                    "int32",
                    init=first_key_of_query(query, t.cache_seqlens[request], t.seq_len_q, t.window_left) - shift,
                )
                end = T.alloc_var(
                    "int32",
                    init=end_key_of_query(query, t.cache_seqlens[request], t.seq_len_q, t.window_right) - shift,
                )
                for e in T.unroll(SCORES // 2):
                    key = e // 2 * 8 + e % 2
                    scores[e // 2 * 4 + half * 2 + e % 2] = mask_score(
                        scores[e // 2 * 4 + half * 2 + e % 2], (key >= first) & (key < end)
                    )
        # Two chains a row: one is bound by its latency.
        for chain in T.unroll(4):
            block_max[chain] = T.max(scores[chain * 2], scores[chain * 2 + 1])
        for e in T.unroll(SCORES - 8):
            block_max[e % 8 // 2] = T.max(block_max[e % 8 // 2], scores[8 + e])
        for half in T.unroll(2):
            block_max[half] = T.max(block_max[half], block_max[half + 2])
        for half in T.unroll(2):
            block_max[half] = T.max(block_max[half], T.shfl_xor(block_max[half], 1))
        for half in T.unroll(2):
            block_max[half] = T.max(block_max[half], T.shfl_xor(block_max[half], 2))
        for half in T.unroll(2):
            block_max[half] = advance_max(running_max[half], block_max[half] * t.softmax_scale_log2)
            alpha[half] = rescale_factor(running_max[half], block_max[half])
            running_max[half] = block_max[half]
            row_sum[half] = row_sum[half] * alpha[half]
        if t.tx % 4 == 0:
            for half in T.unroll(2):
                t.alpha[block % 2, row + half * 8] = alpha[half]
        for pair in T.unroll(SCORES // 2):
            for v in T.unroll(2):
                scores[pair * 2 + v] = probability(scores[pair * 2 + v], t.softmax_scale_log2, running_max[pair % 2])
            row_sum[pair % 2] = row_sum[pair % 2] + (scores[pair * 2] + scores[pair * 2 + 1])
            for v in T.vectorized(2):
                t.kv[stage, row + pair % 2 * 8, head_dim_v + pair // 2 * 8 + column + v] = scores[pair * 2 + v]

    @T.macro
    def normalise(request, row, row_sum, running_max, t):
        # The sums over a row's threads, and what its outputs are multiplied by. Its threads write the same value.
        share = T.alloc_local((2,), accum)
        for half in T.unroll(2):
            row_sum[half] = row_sum[half] + T.shfl_xor(row_sum[half], 1)
            row_sum[half] = row_sum[half] + T.shfl_xor(row_sum[half], 2)
            share[half] = 0
        if t.has_sink != 0:
            # A piece of a split request leaves the sink to the combine kernel.
            if T.Not(is_split(t.part, request)):
                for half in T.unroll(2):
                    sink = t.attn_sink[t.head, T.truncmod(t.tile[0] + row + half * 8, t.group_size)]
                    share[half] = sink_share(running_max[half], sink)
        for half in T.unroll(2):
            t.inverse_sum[row + half * 8] = inverse_sum(row_sum[half], share[half])

    @T.macro
    def write_lse(request, row, row_sum, running_max, t):
        if is_split(t.part, request):
            t.lse_accum_log2[split_slot(t.part, request, t.num_splits), t.head, row] = partial_lse_log2(
                row_sum, running_max
            )
        else:
            t.softmax_lse[request, t.head, row] = final_lse(row_sum, running_max, t.lse_scale)

    @T.macro
    def score_warpgroup(t):
        q_registers = T.alloc_local((Q_STEPS_IN_REGISTERS * 2 * A_REGISTERS,), dtype)
        scores = T.alloc_local((SCORES,), accum)
        running_max = T.alloc_local((2,), accum)
        row_sum = T.alloc_local((2,), accum)  # over this thread's columns until the request ends
        turn = T.alloc_var("int32", init=0)
        row = t.tx // 32 * 16 + t.tx % 32 // 4
        column = t.tx % 4 * 2
        # Once, not in the loop: the unused bits of the struct would be live from one block to the next.
        keys = T.alloc_wgmma_desc()
        tail = T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(keys, T.address_of(t.kv[0, 0, 0]), 1, 1, 64)  # 128-byte swizzle
        T.initialize_wgmma_descriptor(tail, T.address_of(t.q_tail[0]), 0, 8, 16)  # none

        for request in T.serial(t.part.begin_request, t.part.end_request_inclusive + 1):
            bounds = begin_and_end(request, t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            for half in T.unroll(2):
                running_max[half] = RUNNING_MAX_START
                row_sum[half] = 0
            if begin < end:
                q_stage = stage_of(turn)
                for i in T.unroll(NUM_THIRDS):
                    T.barrier_wait(t.full[q_stage * NUM_THIRDS + i], phase_of(turn))
                take_q(q_registers, q_stage, row, column, t)
                turn = next_turn(turn)
                for block in T.serial(begin, end):
                    stage = stage_of(turn)
                    phase = phase_of(turn)
                    for third, first, count in thirds:
                        T.barrier_wait(t.full[stage * NUM_THIRDS + third], phase)
                        multiply_registers(scores, q_registers, first, count, keys, stage)
                    multiply_tail(scores, tail, keys, stage)
                    # What the item before the last one left in alpha and inverse_sum has been read.
                    T.barrier_wait(
                        t.empty[T.if_then_else(stage == NUM_STAGES - 1, 0, stage + 1)],
                        T.if_then_else(stage == NUM_STAGES - 1, phase, phase ^ 1),
                    )
                    T.wait_wgmma(config.groups_left_at_handover)
                    # The item before, a block with its P or the Q tile, is handed over.
                    arrive_warp(t.p_full, T.if_then_else(stage == 0, NUM_STAGES - 1, stage - 1), t.tx)
                    T.wait_wgmma(0)
                    # Every warp is through with the rope columns: P may take their place.
                    T.sync_threads(SCORE_BARRIER, WARPGROUP)
                    soften(scores, running_max, row_sum, request, block, stage, row, column, t)
                    if block == end - 1:
                        normalise(request, row, row_sum, running_max, t)
                    T.fence_proxy_async()
                    T.sync_warp()
                    if block == end - 1:
                        arrive_warp(t.p_full, stage, t.tx)
                    turn = next_turn(turn)
            if t.tx % 4 == 0:
                for half in T.unroll(2):
                    if t.tile[0] + row + half * 8 < t.rows:
                        write_lse(request, t.tile[0] + row + half * 8, row_sum[half], running_max[half], t)

    return score_warpgroup

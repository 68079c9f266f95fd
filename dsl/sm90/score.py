"""The score warpgroup: S = Q K^T, the online softmax, and P for the output warpgroups."""

from typing import Any

import tilelang.language as T

from tilemla.config import KernelConfig
from tilemla.dsl.attention import RUNNING_MAX_START
from tilemla.dsl.sm90.mask import hide_scores
from tilemla.dsl.sm90.softmax import make_softmax
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
    request_of,
    row_of,
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
    softmax = make_softmax(
        head_dim_v,
        alpha_slot=lambda block, _stage: block % 2,
        inverse_sum_index=lambda _stage, row: row,
        read_sink=lambda row, t: t.attn_sink[t.head, T.truncmod(t.tile[0] + row, t.group_size)],
    )

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
    def score_warpgroup(t):
        q_registers = T.alloc_local((Q_STEPS_IN_REGISTERS * 2 * A_REGISTERS,), dtype)
        scores = T.alloc_local((SCORES,), accum)
        running_max = T.alloc_local((2,), accum)
        row_sum = T.alloc_local((2,), accum)  # over this thread's columns until the request ends
        turn = T.alloc_var("int32", init=0)
        row = row_of(t.tx)
        column = t.tx % 4 * 2
        # Once, not in the loop: the unused bits of the struct would be live from one block to the next.
        keys = T.alloc_wgmma_desc()
        tail = T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(keys, T.address_of(t.kv[0, 0, 0]), 1, 1, 64)  # 128-byte swizzle
        T.initialize_wgmma_descriptor(tail, T.address_of(t.q_tail[0]), 0, 8, 16)  # none

        for place in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            request = T.alloc_var("int32", init=request_of(place, t))
            bounds = begin_and_end(place, request, t)
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
                # The combine kernel may be launched from here on. When a CTA began by allowing it, the launch met this
                # kernel's first reads: 0.5 to 4 us more of every call with a cut request on an H100.
                T.pdl_trigger()
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
                    hide_scores(scores, request, block, row, column, t)
                    softmax.soften(scores, running_max, row_sum, block, stage, row, column, t)
                    if block == end - 1:
                        softmax.normalise(place, stage, row, row_sum, running_max, t)
                    T.fence_proxy_async()
                    T.sync_warp()
                    if block == end - 1:
                        arrive_warp(t.p_full, stage, t.tx)
                    turn = next_turn(turn)
            if t.tx % 4 == 0:
                for half in T.unroll(2):
                    if t.tile[0] + row + half * 8 < t.rows:
                        softmax.write_lse(
                            place, request, t.tile[0] + row + half * 8, row_sum[half], running_max[half], t
                        )

    return score_warpgroup

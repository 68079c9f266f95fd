"""The score warpgroup of the sparse kernels: S = Q K^T over gathered tokens, the online softmax, and P."""

import functools
from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import RUNNING_MAX_START
from tilemla.dsl.sm90.mask import hide_unset
from tilemla.dsl.sm90.sparse_tile import (
    ALONE,
    NUM_PIECES,
    NUM_STAGES,
    NUM_WARPS,
    OPERANDS,
    PIECES,
    Q_STAGE,
    Q_STEPS,
    k_step_offset,
    load_q,
    tokens_of_warp,
)
from tilemla.dsl.sm90.tile import (
    A_REGISTERS,
    K_STEP,
    SCORE_BARRIER,
    SCORES,
    WARPGROUP,
    arrive_warp,
    next_turn,
    phase_of,
    request_of,
    row_of,
    stage_of,
)


def make_score_warpgroup(
    dtype: str,
    head_dim_qk: int,
    softmax: Any,
    blocks_of: Any,
    write_sums: Any,
    *,
    mask: Any = None,
) -> Any:
    """Make the macro ``score_warpgroup(t)``; see ``score`` for the elements that a thread holds.

    Parameters
    ----------
    dtype : str
        Of queries and stages.
    head_dim_qk : int
        Columns of a key.
    softmax : SimpleNamespace
        Of `make_softmax`.
    blocks_of : callable
        Of a request's place, itself and t: first block, and one past the last.
    write_sums : macro
        ``(place, request, row, half, row_sum, running_max, t)``: what a row's sum and maximum come to is written.
    mask : macro, optional
        ``(scores, request, block, stage, row, column, t)``: make -inf of what a row does not see. By default the words
        say it that the producer's warps write beside a block: bits for its tokens.
    """
    all_tokens = 2 ** tokens_of_warp(ALONE) - 1
    operand, accum = OPERANDS[dtype], "float32"
    # Of each piece, its number, the K steps multiplied from registers (first, count), and those from shared memory.
    pieces = []
    for piece, (first_column, end_column) in enumerate(zip(PIECES, (*PIECES[1:], head_dim_qk), strict=True)):
        first, end = first_column // K_STEP, end_column // K_STEP
        middle = min(max(Q_STEPS, first), end)
        pieces.append((piece, first, middle - first, middle, end - middle))

    def common_bits(words):
        return functools.reduce(T.bitwise_and, [words[w] for w in range(NUM_WARPS)])

    @T.macro
    def multiply_registers(scores, q_registers, first, count, keys, stage):
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
                k_step_offset(first + k, stage),
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
    def multiply_shared(scores, first, count, keys, stage):
        T.warpgroup_fence_operand(scores, 0, SCORES)
        T.warpgroup_arrive()
        for k in T.unroll(count):
            T.ptx_wgmma_ss(
                accum,
                "m64n64k16",
                True,
                True,
                operand,
                operand,
                "fp32",
                keys.data,
                k_step_offset(first + k, Q_STAGE),
                keys.data,
                k_step_offset(first + k, stage),
                scores.data,
                0,
                T.Select(first + k != 0, 1, 0),
                1,
                1,
            )
        T.warpgroup_commit_batch()
        T.warpgroup_fence_operand(scores, 0, SCORES)

    @T.macro
    def take_q(q_registers, row, column, t):
        # A thread's share of an m64k16 operand: pairs at two rows 8 apart and at two columns 8 apart.
        for k in T.unroll(Q_STEPS):
            for e in T.unroll(A_REGISTERS):
                for v in T.vectorized(2):
                    q_registers[(k * A_REGISTERS + e) * 2 + v] = t.kv[
                        Q_STAGE, row + e % 2 * 8, k * K_STEP + e // 2 * 8 + column + v
                    ]

    @T.macro
    def hide_tokens(scores, request, block, stage, row, column, t):
        words = T.alloc_local((NUM_WARPS,), "int32")
        for w in T.vectorized(NUM_WARPS):
            words[w] = t.valid[stage, w]
        if common_bits(words) != all_tokens:
            for w in T.unroll(NUM_WARPS):
                bits = T.alloc_var("int32", init=T.shift_right(words[w], column))
                hide_unset(scores, w * (SCORES // NUM_WARPS), SCORES // NUM_WARPS, bits)

    mask = mask or hide_tokens

    @T.macro
    def score_warpgroup(t):
        q_registers = T.alloc_local((Q_STEPS * 2 * A_REGISTERS,), dtype)
        scores = T.alloc_local((SCORES,), accum)
        running_max = T.alloc_local((2,), accum)
        row_sum = T.alloc_local((2,), accum)  # over this thread's columns until the request ends
        turn = T.alloc_var("int32", init=0)
        q_phase = T.alloc_var("int32", init=0)
        row = row_of(t.tx)
        column = t.tx % 4 * 2
        keys = T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(keys, T.address_of(t.kv[0, 0, 0]), 1, 1, 64)  # 128-byte swizzle
        if t.part.begin_place <= t.part.end_place_inclusive:
            load_q(t.part.begin_place, head_dim_qk, t)
        for place in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            request = request_of(place, t)
            bounds = blocks_of(place, request, t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            for half in T.unroll(2):
                running_max[half] = RUNNING_MAX_START
                row_sum[half] = 0
            T.barrier_wait(t.q_full[0], q_phase)
            q_phase = q_phase ^ 1
            # Not earlier, as in `score`: half a microsecond of every call with a cut request on an H100.
            T.pdl_trigger()
            take_q(q_registers, row, column, t)
            if begin >= end:
                # Nothing is multiplied with this Q.
                T.sync_threads(SCORE_BARRIER, WARPGROUP)
                if place < t.part.end_place_inclusive:
                    load_q(place + 1, head_dim_qk, t)
            for block in T.serial(begin, end):
                stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
                phase = T.alloc_var("int32", init=phase_of(turn, NUM_STAGES))
                for piece, first, count, first_shared, count_shared in pieces:
                    T.barrier_wait(t.full[stage * NUM_PIECES + piece], phase)
                    # Here and not in the producer, whose threads it would have wait for all that they load ahead.
                    T.fence_proxy_async()
                    if count > 0:
                        multiply_registers(scores, q_registers, first, count, keys, stage)
                    if count_shared > 0:
                        multiply_shared(scores, first_shared, count_shared, keys, stage)
                T.wait_wgmma(0)
                # Every warp is through with the columns where P goes, and with Q.
                T.sync_threads(SCORE_BARRIER, WARPGROUP)
                if (block == end - 1) & (place < t.part.end_place_inclusive):
                    load_q(place + 1, head_dim_qk, t)
                mask(scores, request, block, stage, row, column, t)
                softmax.soften(scores, running_max, row_sum, block, stage, row, column, t)
                if block == end - 1:
                    softmax.normalise(place, stage, row, row_sum, running_max, t)
                T.fence_proxy_async()
                T.sync_warp()
                arrive_warp(t.p_full, stage, t.tx)
                turn = next_turn(turn, NUM_STAGES)
            if t.tx % 4 == 0:
                for half in T.unroll(2):
                    if t.tile[0] + row + half * 8 < t.rows:
                        write_sums(place, request, t.tile[0] + row + half * 8, half, row_sum, running_max, t)

    return score_warpgroup

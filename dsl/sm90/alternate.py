"""A warpgroup of two that alternate: scores of every second block, half of the output columns.

Two such warpgroups take turns. Each multiplies Q with the blocks of its own stage, takes their softmax, hands P over to
the other one and multiplies with it from registers; with the P of the other one's blocks it multiplies from shared
memory. While one is in its softmax, the other has products under way, and each piece of a stage is free as soon as one
warpgroup is done with it. A block's P is made against the running maximum that the block before it left, so that both
bring their accumulators from maximum to maximum in the order of the blocks, whoever made the scores.

What counts is how early a stage is handed back, since the next block but one is loaded there. The columns of a
warpgroup's own half are free first, are loaded first and are multiplied with first; the other half follows the products
with the P of the block before. A thread's elements of scores and output are groups of eight columns, of each two
neighbouring ones of row `row` and the same two of row `row + 8`.
"""

import functools
from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import (
    RUNNING_MAX_START,
    inverse_sum,
    probability,
    rescale_factor,
    sink_share,
)
from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.mask import hide_unset
from tilemla.dsl.sm90.softmax import make_advance
from tilemla.dsl.sm90.sparse_tile import (
    ALONE,
    NUM_WARPS,
    OPERANDS,
    Q_STAGE,
    QUARTER,
    STAGE_BYTES,
    TURN_PIECES,
    WARP,
    full_of_half,
    k_step_offset,
    load_q,
    tokens_of_warp,
)
from tilemla.dsl.sm90.tile import (
    A_REGISTERS,
    ATOM_BYTES,
    HALF,
    K_STEP,
    ROWS,
    SCORES,
    SLICE,
    WARPGROUP,
    arrive_warp,
    request_of,
    row_of,
)

SUMS = 4 * ROWS  # rows' sums that the warpgroups exchange: each one's, of a query and of the next one
_PV_STEPS = BLOCK_N // K_STEP
_OUTPUTS = HALF // 2  # elements of the output that a thread holds, those of each accumulator side by side
_QUARTER_OUTPUTS = QUARTER // 2


def make_alternating_warpgroup(
    dtype: str,
    head_dim_qk: int,
    head_dim_v: int,
    blocks_of: Any,
    way_out: Any,
    *,
    read_sink: Any,
    write_sums: Any,
    sink_counts: Any = None,
    keeps_max: bool = False,
    launches: bool = False,
    blocks: int = ALONE,
) -> Any:
    """Make the macro ``warpgroup(own, t)``.

    ``own``, 0 or 1, is the stage of the blocks whose scores the warpgroup makes, and which half of the output columns
    it has.

    Parameters
    ----------
    dtype : str
        Of queries and stages.
    head_dim_qk, head_dim_v : int
        Columns of a key and of a value, behind which P goes.
    blocks_of : callable
        Of a request's place, itself and t: first block, and one past the last.
    way_out : SimpleNamespace
        Macros ``write_tile(acc, factors, place, request, stage, first_column, row, column, barrier_id, t)``, whose
        stage is that of the request's last block, and ``write_empty(place, request, first_column, t)``.
    read_sink : callable
        Of a row of the tile and t: the attention sink of the row's head.
    write_sums : macro
        ``(place, request, row, half, row_sum, running_max, t)``: what a row's sum and maximum come to is written.
    sink_counts : callable, optional
        Of a request's place and t: whether the sink is to be counted here. By default it is wherever there is one.
    keeps_max : bool
        Whether ``t.true_max`` gets the largest scaled score of each of a thread's rows.
    launches : bool
        Whether a kernel that follows may be launched once Q is there.
    blocks : int
        Thread blocks that gather the tokens of a block, each warp of which writes a word of the mask, and that a stage
        is handed back to.
    """
    operand, accum = OPERANDS[dtype], "float32"
    half_steps, behind = HALF // K_STEP, (head_dim_qk - 2 * HALF) // K_STEP
    num_words = NUM_WARPS * blocks
    fours = tuple(range(0, num_words, 4))
    all_tokens = 2 ** tokens_of_warp(blocks) - 1
    advance = make_advance(keeps_max=keeps_max)

    def has_sink(place, t):
        there = t.has_sink != 0
        return there if sink_counts is None else there & sink_counts(place, t)

    def step_of(half, i):
        # K step i of a half; the last ones of either are those behind V
        return T.if_then_else(i < half_steps, half * half_steps + i, half_steps + i)

    @T.macro
    def multiply_keys(scores, half, own, keys):
        T.warpgroup_fence_operand(scores, 0, SCORES)
        T.warpgroup_arrive()
        for i in T.unroll(half_steps if half == own else half_steps + behind):
            T.ptx_wgmma_ss(
                accum,
                "m64n64k16",
                True,
                True,
                operand,
                operand,
                "fp32",
                keys.data,
                k_step_offset(step_of(half, i), Q_STAGE),
                keys.data,
                k_step_offset(step_of(half, i), own),
                scores.data,
                0,
                1 if half != own else T.Select(i != 0, 1, 0),
                1,
                1,
            )
        T.warpgroup_commit_batch()
        T.warpgroup_fence_operand(scores, 0, SCORES)

    @T.macro
    def multiply_half(scores, half, phase, own, keys, t):
        # with the keys' columns that are the output columns of warpgroup `half`, and those behind V with the last half
        T.barrier_wait(t.full[full_of_half(own, half)], phase)
        # Here and not in the producer, whose threads it would have wait for all that they load ahead.
        T.call_extern("handle", "tilemla::fence_shared")
        multiply_keys(scores, half, own, keys)

    def values_of(stage, half, quarter, k):
        # of 16 tokens of a stage, as `k_step_offset`: the columns of an accumulator
        first_atom = (half * HALF + quarter * QUARTER) // SLICE
        return (stage * STAGE_BYTES + first_atom * ATOM_BYTES >> 4) + k * (K_STEP * SLICE * 2 >> 4)

    @T.macro
    def multiply_own(acc, p, quarter, own, values):
        # with P from registers
        T.warpgroup_fence_operand(p, 0, SCORES // 2)
        T.warpgroup_fence_operand(acc, quarter * _QUARTER_OUTPUTS, _QUARTER_OUTPUTS)
        T.warpgroup_arrive()
        for k in T.unroll(_PV_STEPS):
            T.ptx_wgmma_rs(
                accum,
                "m64n128k16",
                False,
                operand,
                operand,
                "fp32",
                p.data,
                k * 2 * A_REGISTERS,
                values.data,
                values_of(own, own, quarter, k),
                acc.data,
                quarter * _QUARTER_OUTPUTS,
                1,
                1,
                1,
            )
        T.warpgroup_commit_batch()
        T.warpgroup_fence_operand(acc, quarter * _QUARTER_OUTPUTS, _QUARTER_OUTPUTS)

    @T.macro
    def multiply_other(acc, quarter, own, keys, values):
        # with P from where the other warpgroup put it
        T.warpgroup_fence_operand(acc, quarter * _QUARTER_OUTPUTS, _QUARTER_OUTPUTS)
        T.warpgroup_arrive()
        for k in T.unroll(_PV_STEPS):
            T.ptx_wgmma_ss(
                accum,
                "m64n128k16",
                True,
                False,
                operand,
                operand,
                "fp32",
                keys.data,
                k_step_offset(head_dim_v // K_STEP, 1 - own) + k * (K_STEP * 2 >> 4),
                values.data,
                values_of(1 - own, own, quarter, k),
                acc.data,
                quarter * _QUARTER_OUTPUTS,
                1,
                1,
                1,
            )
        T.warpgroup_commit_batch()
        T.warpgroup_fence_operand(acc, quarter * _QUARTER_OUTPUTS, _QUARTER_OUTPUTS)

    @T.macro
    def free(stage, piece, t):
        if blocks == ALONE:
            arrive_warp(t.empty, stage * TURN_PIECES + piece, t.tx)
        elif t.tx % WARP < blocks:
            T.mbarrier_arrive(t.empty[stage * TURN_PIECES + piece], t.tx % WARP)

    @T.macro
    def free_first(stage, own, t):
        free(stage, own * 2, t)

    @T.macro
    def free_second(stage, own, t):
        free(stage, own * 2 + 1, t)
        if stage != own:
            free(stage, TURN_PIECES - 1, t)  # P, where the rope part was

    @T.macro
    def scale(acc, factors):
        for e in T.unroll(_OUTPUTS):
            acc[e] = acc[e] * factors[e % 4 // 2]

    @T.macro
    def hand_back(stage, left, own, t):
        # Products that were begun after those with the stage are left under way.
        T.wait_wgmma(left + 1)
        T.sync_warp()
        free_first(stage, own, t)
        T.wait_wgmma(left)
        T.sync_warp()
        free_second(stage, own, t)

    @T.macro
    def follow(acc, running_max, row_sum, phase, own, keys, values, row, t):
        # A block of the other warpgroup.
        T.barrier_wait(t.p_full[1 - own], phase)
        new_max = T.alloc_local((2,), accum)
        for half in T.unroll(2):
            new_max[half] = t.maxima[1 - own, row + half * 8]
        if T.any_sync((new_max[0] != running_max[0]) | (new_max[1] != running_max[1])) != 0:
            T.wait_wgmma(0)  # of scores under way, which ptxas would have waited for
            for half in T.unroll(2):
                new_max[half] = rescale_factor(running_max[half], new_max[half])
                row_sum[half] = row_sum[half] * new_max[half]
                running_max[half] = t.maxima[1 - own, row + half * 8]
            scale(acc, new_max)
        multiply_other(acc, 0, own, keys, values)
        multiply_other(acc, 1, own, keys, values)

    @T.macro
    def common_bits(bits, own, t):
        words = T.alloc_local((num_words,), "int32")
        for four in fours:
            for w in T.vectorized(4):
                words[four + w] = t.valid[own, four + w]
        bits[0] = functools.reduce(T.bitwise_and, [words[w] for w in range(num_words)])

    @T.macro
    def hide_tokens(scores, bits, own, column, t):
        if bits[0] != all_tokens:
            for w in T.unroll(num_words):
                word = T.alloc_var("int32", init=T.shift_right(t.valid[own, w], column))
                hide_unset(scores, w * (SCORES // num_words), SCORES // num_words, word)

    @T.macro
    def soften(scores, p, running_max, row_sum, factors, p_place, own, row, t):
        # P both in registers and in the stage's columns behind V, with the step on maximum and sum.
        advance(scores, running_max, row_sum, factors, t)
        if t.tx % 4 == 0:
            for half in T.unroll(2):
                t.maxima[own, row + half * 8] = running_max[half]
        for pair in T.unroll(SCORES // 2):
            for v in T.unroll(2):
                scores[pair * 2 + v] = probability(scores[pair * 2 + v], t.softmax_scale_log2, running_max[pair % 2])
            row_sum[pair % 2] = row_sum[pair % 2] + (scores[pair * 2] + scores[pair * 2 + 1])
            for v in T.vectorized(2):
                p[pair * 2 + v] = scores[pair * 2 + v]
        T.call_extern("handle", "tilemla::store_p", p_place, T.address_of(p[0]))

    @T.macro
    def meet(q_phase, t):
        # Both warpgroups are here, once for each request.
        T.sync_warp()
        arrive_warp(t.met, 0, t.tx)
        T.barrier_wait(t.met[0], q_phase)

    @T.macro
    def settle(running_max, row_sum, factors, place, slot, q_phase, own, row, t):
        # The sums of both warpgroups, and what the outputs are multiplied by.
        for half in T.unroll(2):
            row_sum[half] = row_sum[half] + T.shfl_xor(row_sum[half], 1)
            row_sum[half] = row_sum[half] + T.shfl_xor(row_sum[half], 2)
        if t.tx % 4 == 0:
            for half in T.unroll(2):
                t.sums[(slot * 2 + own) * ROWS + row + half * 8] = row_sum[half]
                if keeps_max:
                    t.tops[(slot * 2 + own) * ROWS + row + half * 8] = t.true_max[half]
        meet(q_phase, t)
        for half in T.unroll(2):
            row_sum[half] = row_sum[half] + t.sums[(slot * 2 + 1 - own) * ROWS + row + half * 8]
            if keeps_max:
                t.true_max[half] = T.max(t.true_max[half], t.tops[(slot * 2 + 1 - own) * ROWS + row + half * 8])
            factors[half] = 0
        if has_sink(place, t):
            for half in T.unroll(2):
                sink = read_sink(row + half * 8, t)
                factors[half] = sink_share(running_max[half], sink)
        for half in T.unroll(2):
            factors[half] = inverse_sum(row_sum[half], factors[half])

    @T.macro
    def warpgroup(own, t):
        acc = T.alloc_local((_OUTPUTS,), accum)
        scores = T.alloc_local((SCORES,), accum)
        p = T.alloc_local((SCORES,), dtype)
        running_max = T.alloc_local((2,), accum)
        row_sum = T.alloc_local((2,), accum)  # over this thread's columns of its own blocks until the request ends
        factors = T.alloc_local((2,), accum)
        q_phase = T.alloc_var("int32", init=0)
        phase = T.alloc_var("int32", init=0)  # of the own stage
        other_phase = T.alloc_var("int32", init=0)
        stage = T.alloc_var("int32", init=0)  # of the request's first block
        slot = T.alloc_var("int32", init=0)
        row = row_of(t.tx)
        column = t.tx % 4 * 2
        bits = T.alloc_local((1,), "int32")
        p_place = T.alloc_var(
            "int32",
            init=T.call_extern(
                "int32",
                "tilemla::place_of_p",
                T.call_extern("int32", "tilemla::shared_address", T.address_of(t.kv[own, 0, head_dim_v])),
            ),
        )
        keys = T.alloc_wgmma_desc()
        values = T.alloc_wgmma_desc()
        # 128-byte swizzle
        T.initialize_wgmma_descriptor(keys, T.address_of(t.kv[0, 0, 0]), 1, 1, 64)
        T.initialize_wgmma_descriptor(values, T.address_of(t.kv[0, 0, 0]), 1, ATOM_BYTES >> 4, 64)
        if own == 0:
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
                if keeps_max:
                    t.true_max[half] = -T.infinity(accum)
            if begin >= end:
                # Nothing is multiplied with this Q.
                T.barrier_wait(t.q_full[0], q_phase)
                meet(q_phase, t)
                if own == 0:
                    if place < t.part.end_place_inclusive:
                        load_q(place + 1, head_dim_qk, t)
                way_out.write_empty(place, request, own * HALF, t)
            else:
                for e in T.unroll(_OUTPUTS):
                    acc[e] = 0
                first = T.alloc_var("int32", init=T.if_then_else(stage == own, begin, begin + 1))
                # Where the next Q may be loaded: the other warpgroup has handed over what it made of this one.
                last_with_next = T.alloc_var(
                    "int32", init=T.if_then_else(place < t.part.end_place_inclusive, end - 1, -1)
                )
                for pair in T.serial(T.shift_right(end - first + 1, 1)):
                    block = T.alloc_var("int32", init=first + pair * 2)
                    if pair == 0:
                        T.barrier_wait(t.q_full[0], q_phase)
                        if launches:
                            T.pdl_trigger()
                    multiply_half(scores, own, phase, own, keys, t)
                    if block > begin:
                        follow(acc, running_max, row_sum, other_phase, own, keys, values, row, t)
                        other_phase = other_phase ^ 1
                    multiply_half(scores, 1 - own, phase, own, keys, t)
                    common_bits(bits, own, t)
                    if block > begin:
                        hand_back(1 - own, 1, own, t)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(scores, 0, SCORES)
                    # Every warp is through with the columns where P goes, and with Q.
                    T.sync_threads(own + 1, WARPGROUP)
                    hide_tokens(scores, bits, own, column, t)
                    soften(scores, p, running_max, row_sum, factors, p_place, own, row, t)
                    T.call_extern("handle", "tilemla::fence_shared")
                    T.sync_warp()
                    arrive_warp(t.p_full, own, t.tx)
                    if T.any_sync((factors[0] != 1.0) | (factors[1] != 1.0)) != 0:
                        scale(acc, factors)
                    multiply_own(acc, p, 0, own, values)
                    multiply_own(acc, p, 1, own, values)
                    if block == last_with_next:
                        load_q(place + 1, head_dim_qk, t)
                    if block < end - 1:
                        hand_back(own, 0, own, t)
                    else:
                        T.wait_wgmma(0)
                    T.warpgroup_fence_operand(acc, 0, _OUTPUTS)
                    phase = phase ^ 1
                stage = T.bitwise_and(stage + (end - begin - 1), 1)  # of the last block
                if stage != own:
                    follow(acc, running_max, row_sum, other_phase, own, keys, values, row, t)
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(acc, 0, _OUTPUTS)
                    other_phase = other_phase ^ 1
                settle(running_max, row_sum, factors, place, slot, q_phase, own, row, t)
                way_out.write_tile(acc, factors, place, request, stage, own * HALF, row, column, own + 1, t)
                free_first(stage, own, t)
                free_second(stage, own, t)
                stage = stage ^ 1
                slot = slot ^ 1
            q_phase = q_phase ^ 1
            if own == 0:
                if t.tx % 4 == 0:
                    for half in T.unroll(2):
                        if t.tile[0] + row + half * 8 < t.rows:
                            write_sums(place, request, t.tile[0] + row + half * 8, half, row_sum, running_max, t)

    return warpgroup

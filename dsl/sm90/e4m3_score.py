"""The score warpgroup of the decode kernel over e4m3: S = Q K^T on the bytes as they are, the softmax, and P."""

from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import RUNNING_MAX_START
from tilemla.dsl.sm90.e4m3_tile import (
    A_REGISTERS,
    ATOM_BYTES,
    ATOM_COLUMNS,
    CHUNK,
    K_STEP,
    ROPE_COLUMNS,
    SHARED_STEPS,
    TAIL_ATOMS,
    arrive_elected,
    phase_of,
    slot_of,
    slot_phase_of,
    stage_of,
    with_fields,
)
from tilemla.dsl.sm90.mask import hide_scores
from tilemla.dsl.sm90.softmax import make_softmax
from tilemla.dsl.sm90.tile import ROWS, SCORE_BARRIER, SCORES, WARPGROUP, begin_and_end, request_of, row_of

_STEPS_PER_ATOM = ATOM_COLUMNS // K_STEP


def make_score_warpgroup(head_dim_v: int) -> Any:
    """Make the macro ``score_warpgroup(score_scale, t)``.

    Q is held in registers, but for its last latent columns. P is float16, as are the values that it is multiplied with:
    it is at most 2**8, and has three bits more than in bfloat16.

    Parameters
    ----------
    head_dim_v : int
        Latent columns; the rope columns follow them.
    """
    accum = "float32"
    latent_steps, rope_steps = head_dim_v // K_STEP, ROPE_COLUMNS // K_STEP
    latent_held = latent_steps - SHARED_STEPS
    num_held = latent_held + rope_steps
    softmax = make_softmax(
        0,  # P has a place of its own
        alpha_slot=lambda _block, slot: slot,
        inverse_sum_index=lambda slot, row: (slot, row),
        read_sink=lambda row, t: t.attn_sink[t.head, T.truncmod(t.tile[0] + row, t.group_size)],
    )

    def latent_offset(k_step, stage):
        # of a K step, in the 16-byte units of a wgmma descriptor
        within = k_step // _STEPS_PER_ATOM * ATOM_BYTES + k_step % _STEPS_PER_ATOM * K_STEP
        return stage * (ROWS * head_dim_v >> 4) + (within >> 4)

    def tail_offset(k_step):
        step = TAIL_ATOMS * _STEPS_PER_ATOM - SHARED_STEPS + k_step
        return (step // _STEPS_PER_ATOM * ATOM_BYTES + step % _STEPS_PER_ATOM * K_STEP) >> 4

    def rope_offset(k_step, stage):
        return stage * (ROWS * ROPE_COLUMNS >> 4) + (k_step * K_STEP >> 4)

    @T.macro
    def multiply_registers(scores, q_registers, first, count, keys, offset, stage):
        for k in T.unroll(count):
            T.ptx_wgmma_rs(
                accum,
                "m64n64k32",
                True,
                "e4m3",
                "e4m3",
                "fp32",
                q_registers.data,
                (first + k) * A_REGISTERS,
                keys.data,
                offset(k, stage),
                scores.data,
                0,
                T.Select(first + k != 0, 1, 0),
                1,
                1,
            )

    @T.macro
    def multiply_shared(scores, tail, keys, stage):
        for k in T.unroll(SHARED_STEPS):
            T.ptx_wgmma_ss(
                accum,
                "m64n64k32",
                True,
                True,
                "e4m3",
                "e4m3",
                "fp32",
                tail.data,
                tail_offset(k),
                keys.data,
                latent_offset(latent_held + k, stage),
                scores.data,
                0,
                1,
                1,
                1,
            )

    @T.macro
    def start_scores(scores, q_registers, latent, rope, tail, stage):
        T.warpgroup_fence_operand(q_registers, 0, num_held * A_REGISTERS)
        T.warpgroup_fence_operand(scores, 0, SCORES)
        T.warpgroup_arrive()
        multiply_registers(scores, q_registers, 0, latent_held, latent, latent_offset, stage)
        multiply_shared(scores, tail, latent, stage)
        multiply_registers(scores, q_registers, latent_held, rope_steps, rope, rope_offset, stage)
        T.warpgroup_commit_batch()
        T.warpgroup_fence_operand(scores, 0, SCORES)
        T.warpgroup_fence_operand(q_registers, 0, num_held * A_REGISTERS)

    @T.macro
    def take_q(q_registers, stage, t):
        # A thread's share of a K step: four bytes at two rows 8 apart and at two columns 16 apart.
        lane = t.tx % 32
        row = T.alloc_var("int32", init=t.tx // 32 * 16 + lane % 16)
        latent = T.alloc_var(
            "int32",
            init=T.call_extern("int32", "tilemla::shared_address", T.address_of(t.kv[0, 0, 0]))
            + stage * (ROWS * head_dim_v)
            + row * ATOM_COLUMNS,
        )
        rope = T.alloc_var(
            "int32",
            init=T.call_extern("int32", "tilemla::shared_address", T.address_of(t.rope[0, 0, 0]))
            + stage * (ROWS * ROPE_COLUMNS)
            + row * ROPE_COLUMNS,
        )
        for k in T.unroll(latent_held):
            T.call_extern(
                "handle",
                "tilemla::read_rows",
                T.address_of(q_registers[k * A_REGISTERS]),
                latent
                + k // _STEPS_PER_ATOM * ATOM_BYTES
                + T.bitwise_xor(k % _STEPS_PER_ATOM * 2 + lane // 16, row % 8) * CHUNK,
            )
        for k in T.unroll(rope_steps):
            T.call_extern(
                "handle",
                "tilemla::read_rows",
                T.address_of(q_registers[(latent_held + k) * A_REGISTERS]),
                rope + T.bitwise_xor(k * 2 + lane // 16, row // 2 % 4) * CHUNK,
            )
        # 16 bytes at a time; the last of them is multiplied with the tail before it comes here again.
        for atom in T.unroll(TAIL_ATOMS):
            for i in T.unroll(ROWS * ATOM_COLUMNS // CHUNK // WARPGROUP):
                for v in T.vectorized(CHUNK):
                    t.q_tail[i * 16 + t.tx // 8, atom * ATOM_COLUMNS + t.tx % 8 * CHUNK + v] = t.kv[
                        stage,
                        i * 16 + t.tx // 8,
                        head_dim_v + (atom - TAIL_ATOMS) * ATOM_COLUMNS + t.tx % 8 * CHUNK + v,
                    ]
        T.fence_proxy_async()
        T.sync_threads(SCORE_BARRIER, WARPGROUP)

    @T.macro
    def soften(scores, running_max, row_sum, request, block, item, row, column, t):
        slot = T.alloc_var("int32", init=slot_of(item))
        hide_scores(scores, request, block, row, column, t)
        T.barrier_wait(t.p_empty[slot], slot_phase_of(item) ^ 1)
        softmax.soften(scores, running_max, row_sum, block, slot, row, column, t)

    @T.macro
    def hand_over(item, t):
        T.fence_proxy_async()
        T.sync_warp()
        arrive_elected(t.p_full, slot_of(item))

    @T.macro
    def score_warpgroup(score_scale, t):
        q_registers = T.alloc_local((num_held * A_REGISTERS,), "uint32")
        scores = T.alloc_local((SCORES,), accum)
        running_max = T.alloc_local((2,), accum)
        row_sum = T.alloc_local((2,), accum)  # over this thread's columns until the request ends
        item = T.alloc_var("int32", init=0)
        row = row_of(t.tx)
        column = t.tx % 4 * 2
        softened = with_fields(t, kv=t.p, softmax_scale_log2=score_scale)
        latent = T.alloc_wgmma_desc()
        rope = T.alloc_wgmma_desc()
        tail = T.alloc_wgmma_desc()
        T.initialize_wgmma_descriptor(tail, T.address_of(t.q_tail[0, 0]), 1, 1, 64)  # 128-byte swizzle
        T.initialize_wgmma_descriptor(latent, T.address_of(t.kv[0, 0, 0]), 1, 1, 64)
        T.initialize_wgmma_descriptor(rope, T.address_of(t.rope[0, 0, 0]), 2, 1, 32)  # 64-byte
        for place in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            request = T.alloc_var("int32", init=request_of(place, t))
            bounds = begin_and_end(place, request, t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            for half in T.unroll(2):
                running_max[half] = RUNNING_MAX_START
                row_sum[half] = 0
            if begin < end:
                T.barrier_wait(t.full[stage_of(item)], phase_of(item))
                take_q(q_registers, stage_of(item), t)
                T.barrier_wait(t.p_empty[slot_of(item)], slot_phase_of(item) ^ 1)
                arrive_elected(t.empty, stage_of(item))
                arrive_elected(t.p_full, slot_of(item))
                item += 1
                for block in T.serial(begin, end):
                    T.barrier_wait(t.full[stage_of(item)], phase_of(item))
                    start_scores(scores, q_registers, latent, rope, tail, stage_of(item))
                    T.wait_wgmma(0)
                    T.warpgroup_fence_operand(scores, 0, SCORES)
                    arrive_elected(t.empty, stage_of(item))
                    soften(scores, running_max, row_sum, request, block, item, row, column, softened)
                    if block == end - 1:
                        softmax.normalise(place, slot_of(item), row, row_sum, running_max, t)
                    hand_over(item, t)
                    item += 1
            if t.tx % 4 == 0:
                for half in T.unroll(2):
                    if t.tile[0] + row + half * 8 < t.rows:
                        softmax.write_lse(
                            place, request, t.tile[0] + row + half * 8, row_sum[half], running_max[half], t
                        )

    return score_warpgroup

"""The output warpgroups: O (+)= P V, each for half of the columns, and the tile's way out.

Both run the same instructions, so that an SM fetches these once: a short call is as long as its instructions are new.
"""

from typing import Any

import tilelang.language as T

from tilemla.config import KernelConfig
from tilemla.dsl.attention import first_visible_key
from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.load import PLACE, make_loader
from tilemla.dsl.sm90.tile import (
    NOT_UNROLLED,
    NUM_STAGES,
    ROWS,
    arrive_warp,
    assume_stage,
    barrier_of_half,
    begin_and_end,
    half_of,
    is_loading,
    next_turn,
    phase_of,
    request_of,
    row_of,
    stage_of,
    sync_half,
)
from tilemla.dsl.sm90.way_out import make_way_out


def make_output_warpgroups(page_block_size: int, head_dim_qk: int, head_dim_v: int, config: KernelConfig) -> Any:
    """Make the macro ``output_warpgroups(acc, cursor, t)``.

    ``acc`` is the (64, 512) accumulator of both, ``cursor`` the load cursor, used in one warp of the right one.

    Parameters
    ----------
    page_block_size, head_dim_qk, head_dim_v : int
        Tokens of a page, columns of a key and of a value.
    config : KernelConfig
        See `make_loader`.
    """
    accum = "float32"
    seek, load = make_loader(page_block_size, head_dim_qk, config)
    way_out = make_way_out(head_dim_v, 2)

    @T.macro
    def clear_tokens(begin, end, stage, t):
        for i in T.unroll(begin, end, annotations=NOT_UNROLLED):
            for j in T.Parallel(head_dim_v):  # a thread's are of its warpgroup's half
                t.kv[stage, i, j] = 0

    @T.macro
    def clear_unseen(request, block, stage, t):
        # P is 0 where no query sees a token, but what lies there may be NaN.
        assume_stage(stage)
        shift = T.alloc_var("int32", init=block * BLOCK_N)
        seqlen = T.alloc_var("int32", init=t.cache_seqlens[request])
        first = T.alloc_var("int32", init=first_visible_key(seqlen, t.seq_len_q, t.window_left) - shift)
        if (shift + BLOCK_N > seqlen) | (first > 0):
            clear_tokens(0, T.min(first, BLOCK_N), stage, t)
            clear_tokens(T.max(seqlen - shift, 0), BLOCK_N, stage, t)
            T.fence_proxy_async()
            sync_half(t.tx)

    @T.macro
    def hand_back(stage, turn: T.Ref, cursor, t):
        # This warpgroup is done with a stage; once the other one is too, the loading warp fills it again.
        # `turn` is passed by reference: a copy of it would cost a register.
        arrive_warp(t.empty, stage, t.tx)
        if is_loading(t.tx):
            load(stage, phase_of(turn), cursor, t)

    @T.macro
    def output_warpgroups(acc, cursor, t):
        scale = T.alloc_fragment((ROWS,), accum)
        turn = T.alloc_var("int32", init=0)
        row = row_of(t.tx)
        if is_loading(t.tx):
            cursor[PLACE] = t.part.begin_place
            seek(cursor, t)
            for stage in T.serial(NUM_STAGES):
                load(stage, 1, cursor, t)
        for place in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            bounds = begin_and_end(place, request_of(place, t), t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            if begin >= end:
                way_out.write_empty(place, request_of(place, t), 0, t)
            else:
                T.fill(acc, 0)
                # The item before the first block is the Q tile: the score warpgroup has it now, and its stage is free.
                for block in T.serial(begin - 1, end):
                    stage = stage_of(turn)
                    T.barrier_wait(t.p_full[stage], phase_of(turn))
                    if block >= begin:
                        if T.any_sync((t.alpha[block % 2, row] != 1.0) | (t.alpha[block % 2, row + 8] != 1.0)) != 0:
                            for i in T.Parallel(ROWS):
                                scale[i] = t.alpha[block % 2, i]
                            way_out.scale_rows(acc, scale)
                        if (block == end - 1) | ((block == begin) & (t.window_left >= 0)):
                            clear_unseen(request_of(place, t), block, stage, t)
                        T.wgmma_gemm(
                            t.kv[stage, :, head_dim_v : head_dim_v + BLOCK_N],
                            t.kv[stage, :, 0:head_dim_v],
                            acc,
                        )
                        T.wait_wgmma(0)
                    if block < end - 1:
                        T.sync_warp()
                        hand_back(stage, turn, cursor, t)
                        turn = next_turn(turn)
                for i in T.Parallel(ROWS):
                    scale[i] = t.inverse_sum[i]
                last_stage = stage_of(turn)
                request = request_of(place, t)  # again: there is no register to keep it in
                way_out.write_tile(acc, scale, place, request, last_stage, 0, half_of(t.tx), barrier_of_half(t.tx), t)
                hand_back(last_stage, turn, cursor, t)
                turn = next_turn(turn)

    return output_warpgroups

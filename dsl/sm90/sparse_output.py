"""An output warpgroup of the sparse kernels: O (+)= P V for half of the columns."""

from typing import Any

import tilelang.language as T

from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.sparse_tile import NUM_PIECES, NUM_STAGES, QUARTER
from tilemla.dsl.sm90.tile import ROWS, arrive_warp, next_turn, phase_of, request_of, row_of, stage_of


def make_output_warpgroup(head_dim_v: int, way_out: Any, blocks_of: Any) -> Any:
    """Make the macro ``output_warpgroup(first, second, column, barrier_id, t)``.

    ``first`` and ``second`` are the (64, 128) accumulators, ``column`` their first output column, ``barrier_id`` the
    warpgroup's named barrier. They are two since 512 threads begin with 128 registers each, more than which no single
    instruction may take, whatever a warpgroup has later.

    Parameters
    ----------
    head_dim_v : int
        The stage's column where P is.
    way_out : SimpleNamespace
        Of `make_way_out`.
    blocks_of : callable
        Of a request's place, itself and t: first block, and one past the last.
    """
    accum = "float32"

    @T.macro
    def free(stage, piece, t):
        arrive_warp(t.empty, stage * NUM_PIECES + piece, t.tx)

    @T.macro
    def free_second(stage, column, t):
        free(stage, column // QUARTER + 1, t)
        if column == 0:
            free(stage, NUM_PIECES - 1, t)  # P, which lies in what the other warpgroup frees

    @T.macro
    def output_warpgroup(first, second, column, barrier_id, t):
        scale = T.alloc_fragment((ROWS,), accum)
        turn = T.alloc_var("int32", init=0)
        row = row_of(t.tx)
        for place in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            request = request_of(place, t)
            bounds = blocks_of(place, request, t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            if begin >= end:
                way_out.write_empty(place, request, column, t)
                way_out.write_empty(place, request, column + QUARTER, t)
            else:
                T.fill(first, 0)
                T.fill(second, 0)
                for block in T.serial(begin, end):
                    stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
                    T.barrier_wait(t.p_full[stage], phase_of(turn, NUM_STAGES))
                    if T.any_sync((t.alpha[stage, row] != 1.0) | (t.alpha[stage, row + 8] != 1.0)) != 0:
                        for i in T.Parallel(ROWS):
                            scale[i] = t.alpha[stage, i]
                        way_out.scale_rows(first, scale)
                        way_out.scale_rows(second, scale)
                    T.wgmma_gemm(
                        t.kv[stage, :, head_dim_v : head_dim_v + BLOCK_N],
                        t.kv[stage, :, column : column + QUARTER],
                        first,
                    )
                    T.wgmma_gemm(
                        t.kv[stage, :, head_dim_v : head_dim_v + BLOCK_N],
                        t.kv[stage, :, column + QUARTER : column + 2 * QUARTER],
                        second,
                    )
                    if block < end - 1:
                        T.wait_wgmma(1)
                        T.sync_warp()
                        free(stage, column // QUARTER, t)
                        T.wait_wgmma(0)
                        T.sync_warp()
                        free_second(stage, column, t)
                        turn = next_turn(turn, NUM_STAGES)
                    else:
                        T.wait_wgmma(0)
                last_stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
                for i in T.Parallel(ROWS):
                    scale[i] = t.inverse_sum[last_stage * ROWS + i]
                way_out.write_tile(first, scale, place, request, last_stage, column, 0, barrier_id, t)
                way_out.write_tile(second, scale, place, request, last_stage, column + QUARTER, 0, barrier_id, t)
                free(last_stage, column // QUARTER, t)
                free_second(last_stage, column, t)
                turn = next_turn(turn, NUM_STAGES)

    return output_warpgroup

"""The end of a request in the decode kernel for few rows: both warpgroups' outputs are merged and written."""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl.attention import final_lse, inverse_sum, partial_lse_log2, rescale_factor, sink_share
from tilemla.dsl.schedule import is_split, split_slot
from tilemla.dsl.sm90.narrow_tile import (
    COLUMNS,
    CONSUMERS,
    MERGE_BARRIER,
    NUM_TILES,
    NUM_WARPGROUPS,
    PIECE_COLUMNS,
    SCORES,
)
from tilemla.dsl.sm90.tile import WARPGROUP, request_of

INTERLEAVED = 16  # columns of a partial row, see `combine`
_HALF_TILES = NUM_TILES // 2
_MERGED = _HALF_TILES * SCORES  # outputs that a thread merges


def make_way_out(head_dim_v: int) -> SimpleNamespace:
    """Make the macros ``share(acc, running_max, row_sum, at, t)`` and ``write(…, place, at, t)``, which follows it.

    Parameters
    ----------
    head_dim_v : int
        Output columns.
    """
    accum = "float32"

    @T.macro
    def share(acc, running_max, row_sum, at, t):
        # The sums over a row's threads, and the half of the outputs that the other warpgroup writes.
        for step in (4, 8, 16):
            for c in T.unroll(COLUMNS):
                row_sum[c] = row_sum[c] + T.shfl_xor(row_sum[c], step)
        if at.lane < 4:
            for c in T.unroll(COLUMNS):
                column = at.column + c // 2 * 8 + c % 2
                t.sums[at.group, at.warp, column] = row_sum[c]
                t.last_maxima[at.group, column] = running_max[c]
        T.sync_threads(at.barrier, WARPGROUP)  # every warp has read P
        for i in T.unroll(_MERGED):
            t.own[at.group, i * WARPGROUP + t.tx % WARPGROUP] = T.if_then_else(at.group == 0, acc[_MERGED + i], acc[i])
        T.sync_threads(MERGE_BARRIER, CONSUMERS)

    @T.macro
    def merge(acc, running_max, row_sum, mine, theirs, place, at, t):
        # Of each of a thread's rows sum, maximum, and the factors of both warpgroups' outputs. Whichever of them had
        # the first block, the results are the same.
        for c in T.unroll(COLUMNS):
            column = at.column + c // 2 * 8 + c % 2
            sums = T.alloc_local((2,), accum)
            for group in T.unroll(2):
                sums[group] = t.sums[T.bitwise_xor(at.group, group), 0, column]
                for warp in (1, 2, 3):
                    sums[group] = sums[group] + t.sums[T.bitwise_xor(at.group, group), warp, column]
            other_max = T.alloc_var(accum, init=t.last_maxima[1 - at.group, column])
            most = T.alloc_var(accum, init=T.max(running_max[c], other_max))
            mine[c] = rescale_factor(running_max[c], most)
            theirs[c] = rescale_factor(other_max, most)
            row_sum[c] = T.call_extern(accum, "tilemla::sum_of_products", sums[0], mine[c], sums[1], theirs[c])
            running_max[c] = most
            sinks = T.alloc_var(accum, init=0)
            if t.has_sink != 0:
                # A piece of a split request leaves the sink to the combine kernel.
                if T.Not(is_split(t.part, place)):
                    sink = t.attn_sink[t.head, T.truncmod(t.tile[0] + column, t.group_size)]
                    sinks = sink_share(most, sink)
            factor = T.alloc_var(accum, init=inverse_sum(row_sum[c], sinks))
            mine[c] = mine[c] * factor
            theirs[c] = theirs[c] * factor

    @T.macro
    def write_rows(acc, mine, theirs, to, to_partial, at, t):
        four = T.alloc_local((4,), accum)  # two columns of two tiles
        for c in T.unroll(COLUMNS):
            row = t.tile[0] + at.column + c // 2 * 8 + c % 2
            if row < t.rows:
                for piece in T.unroll(_HALF_TILES // 2):
                    for tile in T.unroll(2):
                        for half in T.unroll(2):
                            i = (piece * 2 + tile) * SCORES + c // 2 * 4 + half * 2 + c % 2
                            four[tile * 2 + half] = T.call_extern(
                                accum,
                                "tilemla::sum_of_products",
                                T.if_then_else(at.group == 0, acc[i], acc[_MERGED + i]),
                                mine[c],
                                t.own[1 - at.group, i * WARPGROUP + t.tx % WARPGROUP],
                                theirs[c],
                            )
                    column = at.group * (head_dim_v // NUM_WARPGROUPS) + piece * PIECE_COLUMNS + at.warp * 32
                    if to_partial:
                        T.call_extern(
                            "handle",
                            "tilemla::store_four",
                            T.address_of(t.out_accum[to, t.head, row, column + at.lane // 4 * 4]),
                            four[0],
                            four[1],
                            four[2],
                            four[3],
                        )
                    else:
                        for tile in T.unroll(2):
                            T.call_extern(
                                "handle",
                                "tilemla::store_halves",
                                T.address_of(t.out[to, t.head, row, column + tile * INTERLEAVED + at.lane // 4 * 2]),
                                four[tile * 2],
                                four[tile * 2 + 1],
                            )

    @T.macro
    def write_lse(running_max, row_sum, to, to_partial, at, t):
        if (at.group == 0) & (at.warp == 0) & (at.lane < 4):
            for c in T.unroll(COLUMNS):
                row = t.tile[0] + at.column + c // 2 * 8 + c % 2
                if row < t.rows:
                    if to_partial:
                        t.lse_accum_log2[to, t.head, row] = partial_lse_log2(row_sum[c], running_max[c])
                    else:
                        t.softmax_lse[to, t.head, row] = final_lse(row_sum[c], running_max[c], t.lse_scale)

    @T.macro
    def write(acc, running_max, row_sum, place, at, t):
        mine = T.alloc_local((COLUMNS,), accum)
        theirs = T.alloc_local((COLUMNS,), accum)
        merge(acc, running_max, row_sum, mine, theirs, place, at, t)
        request = T.alloc_var("int32", init=request_of(place, t))
        if is_split(t.part, place):
            slot = T.alloc_var("int32", init=split_slot(t.part, place, request, t.num_splits))
            write_rows(acc, mine, theirs, slot, True, at, t)
            write_lse(running_max, row_sum, slot, True, at, t)
        else:
            write_rows(acc, mine, theirs, request, False, at, t)
            write_lse(running_max, row_sum, request, False, at, t)

    return SimpleNamespace(share=share, write=write)

"""How an output tile leaves its warpgroups: normalised, to its place or to that of a partial result."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.schedule import is_split, split_slot
from tilemla.dsl.sm90.tile import HALF, NOT_UNROLLED, ROWS, WARPGROUP, assume_stage, row_of

INTERLEAVED = 8  # columns of a partial row, see `combine`


def _store_partial(acc, factors, slot, head, row, column, columns, t) -> Any:
    # A thread's elements of an accumulator of so many columns, interleaved as `combine` has it: a row's sectors by half
    # as many instructions.
    return T.call_extern(
        "handle",
        f"tilemla::store_rows<{columns}>",
        T.address_of(t.out_accum[slot, head, row, column + t.tx % 4 * 4]),
        acc.data,
        factors.data,
        8 * t.out_accum.shape[3],
        row < t.rows,
        row + 8 < t.rows,
    )


def make_way_out(width: int, warpgroups: int = 1) -> SimpleNamespace:
    """Make the macros ``scale_rows``, ``write_tile`` and ``write_empty``.

    ``column`` is the first output column of an accumulator, ``part``, from 0 on, which part of its columns the
    warpgroup holds, ``barrier_id`` the warpgroup's named barrier.

    Parameters
    ----------
    width, warpgroups : int
        Columns of an accumulator, and how many warpgroups hold equal parts of them.
    """
    share = width // warpgroups

    @T.macro
    def scale_rows(acc, scale):
        for i, j in T.Parallel(ROWS, width):
            acc[i, j] = acc[i, j] * scale[i]

    @T.macro
    def write_tile(acc, scale, place, request, stage, column, part, barrier_id, t):
        assume_stage(stage)
        # Read here and not at the start, the coordinates keep ptxas from holding addresses in registers all along.
        row0 = T.alloc_var("int32", init=t.tile[0])
        head = T.alloc_var("int32", init=t.tile[1])
        if is_split(t.part, place):
            slot = T.alloc_var("int32", init=split_slot(t.part, place, request, t.num_splits))
            row = T.alloc_var("int32", init=row0 + row_of(t.tx))
            _store_partial(acc, scale, slot, head, row, column + part * share, share, t)
        else:
            scale_rows(acc, scale)
            # The last page has been read: its stage carries the tile to the TMA store before it is loaded again.
            T.copy(acc, t.kv[stage, :, column : column + width])
            T.fence_proxy_async()
            T.sync_threads(barrier_id, WARPGROUP)
            if t.tx % WARPGROUP < 32:
                first = part * share
                T.tma_copy(
                    t.kv[stage, :, column + first : column + first + share],
                    t.out[request, head, row0 : row0 + ROWS, column + first : column + first + share],
                    leader_scope_threads=32,
                )
                T.tma_store_wait(0)
        T.sync_threads(barrier_id, WARPGROUP)

    @T.macro
    def write_empty(place, request, column, t):
        # No block was there to read: nothing is in the accumulator, and no stage is free.
        row0 = T.alloc_var("int32", init=t.tile[0])
        head = T.alloc_var("int32", init=t.tile[1])
        end_row = T.alloc_var("int32", init=T.min(row0 + ROWS, t.rows))
        if is_split(t.part, place):
            slot = T.alloc_var("int32", init=split_slot(t.part, place, request, t.num_splits))
            for row in T.unroll(row0, end_row, annotations=NOT_UNROLLED):
                for j in T.Parallel(width):
                    t.out_accum[slot, head, row, column + j] = 0
        else:
            for row in T.unroll(row0, end_row, annotations=NOT_UNROLLED):
                for j in T.Parallel(width):
                    t.out[request, head, row, column + j] = 0

    return SimpleNamespace(scale_rows=scale_rows, write_tile=write_tile, write_empty=write_empty)


def make_write_tile(out_tile: Callable[[Any, Any, Any], Any], *, splits: bool = False) -> Any:
    """Make the macro ``write_tile`` for accumulators of which each thread holds its elements.

    These are groups of eight columns, of each two neighbouring ones from ``column`` on, of row ``row`` and then of row
    ``row + 8``, and ``factors`` what those of both rows are multiplied by; ``first_column`` is the warpgroup's first
    one.

    Parameters
    ----------
    out_tile : callable
        Of request, first column and t: where the tile of a warpgroup goes, (64, 256).
    splits : bool
        Whether requests may be split.
    """

    @T.macro
    def store_tile(acc, factors, request, stage, first_column, row, column, barrier_id, t):
        # The last block has been read: its stage carries the tile to the TMA store before it is loaded again.
        for pair in T.unroll(HALF // 4):
            for v in T.vectorized(2):
                t.kv[stage, row + pair % 2 * 8, first_column + pair // 2 * 8 + column + v] = (
                    acc[pair * 2 + v] * factors[pair % 2]
                )
        T.fence_proxy_async()
        T.sync_threads(barrier_id, WARPGROUP)
        if t.tx % WARPGROUP < 32:
            T.tma_copy(
                t.kv[stage, :, first_column : first_column + HALF],
                out_tile(request, first_column, t),
                leader_scope_threads=32,
            )
            T.tma_store_wait(0)
        T.sync_threads(barrier_id, WARPGROUP)

    @T.macro
    def write_tile(acc, factors, place, request, stage, first_column, row, column, barrier_id, t):
        if splits and is_split(t.part, place):
            slot = T.alloc_var("int32", init=split_slot(t.part, place, request, t.num_splits))
            head = T.alloc_var("int32", init=t.tile[1])
            tile_row = T.alloc_var("int32", init=t.tile[0] + row)
            _store_partial(acc, factors, slot, head, tile_row, first_column, HALF, t)
        else:
            store_tile(acc, factors, request, stage, first_column, row, column, barrier_id, t)

    return write_tile

"""The loading warp of the decode kernel for few rows: pages as they lie in memory, by bulk copies."""

from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import page_index
from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.narrow_tile import (
    ATOM_COLUMNS,
    PAGE_BYTES,
    PITCH,
    ROWS,
    TOKENS_PER_COPY,
    phase_of,
    stage_of,
)
from tilemla.dsl.sm90.tile import begin_and_end, request_of

_LANES = 32
_BARRIER_BYTES = 8


def make_load_warp(head_dim_qk: int) -> Any:
    """Make the macro ``load_warp(t)``: every page of the part, each when its stage is free.

    Parameters
    ----------
    head_dim_qk : int
        Columns of a query.
    """

    @T.macro
    def prefetch_q(request, t):
        row = T.alloc_var("int32", init=t.tile[0] + t.tx % _LANES)
        if (t.tx % _LANES < ROWS) & (row < t.rows):
            for i in T.unroll(head_dim_qk // ATOM_COLUMNS):
                T.call_extern(
                    "handle", "tilemla::prefetch_line", T.address_of(t.q[request, t.head, row, i * ATOM_COLUMNS])
                )

    @T.macro
    def copy_page(page, stage, pages, full, t):
        lane = t.tx % _LANES
        if lane == 0:
            T.call_extern("handle", "tilemla::expect_bytes", full + stage * _BARRIER_BYTES, PAGE_BYTES)
        T.sync_warp()
        if t.token_stride == PITCH:
            if lane < BLOCK_N // TOKENS_PER_COPY:
                T.call_extern(
                    "handle",
                    "tilemla::copy_bytes",
                    pages + stage * PAGE_BYTES + lane * (TOKENS_PER_COPY * PITCH),
                    T.address_of(t.kcache[page, lane * TOKENS_PER_COPY, t.head, 0]),
                    TOKENS_PER_COPY * PITCH,
                    full + stage * _BARRIER_BYTES,
                )
        else:
            for i in T.unroll(BLOCK_N // _LANES):
                T.call_extern(
                    "handle",
                    "tilemla::copy_bytes",
                    pages + stage * PAGE_BYTES + (i * _LANES + lane) * PITCH,
                    T.address_of(t.kcache[page, i * _LANES + lane, t.head, 0]),
                    PITCH,
                    full + stage * _BARRIER_BYTES,
                )

    @T.macro
    def load_warp(t):
        item = T.alloc_var("int32", init=0)
        page = T.alloc_var("int32", init=0)
        pages = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::shared_address", T.address_of(t.pages[0])))
        full = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::shared_address", T.address_of(t.full[0])))
        for place in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            request = T.alloc_var("int32", init=request_of(place, t))
            bounds = begin_and_end(place, request, t)
            if place > t.part.begin_place:
                prefetch_q(request, t)  # the consumers are still at the pages before
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            if begin < end:
                page = page_index(t.block_table, request, begin)
            for block in T.serial(begin, end):
                T.barrier_wait(t.empty[stage_of(item)], phase_of(item) ^ 1)
                copy_page(page, stage_of(item), pages, full, t)
                item += 1
                page = page_index(t.block_table, request, T.min(block + 1, end - 1))

    return load_warp

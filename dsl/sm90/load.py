"""The loading warp: where it is in the walk, and the TMA loads of the next item."""

from typing import Any

import tilelang.language as T

from tilemla.config import KernelConfig
from tilemla.dsl.attention import first_visible_key
from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.tile import (
    NOT_UNROLLED,
    NUM_STAGES,
    NUM_THIRDS,
    ROWS,
    SLICE,
    arrive_warp,
    assume_stage,
    begin_and_end,
    columns_of_thirds,
    request_of,
)

# The load cursor, a local int32 buffer: the next item to load. REQUEST is the request at PLACE. BLOCK is that block, or
# -1 - block before the Q tile of its request is loaded; blocks from EVICT_FIRST on are the first to be evicted from L2.
# PAGE and what follows are page ids, read one item ahead so that the latency of the block table is hidden.
PLACE, REQUEST, BLOCK, END, EVICT_FIRST, PAGE = range(6)

_LANES = 32


def cursor_size(page_block_size: int) -> int:
    """Elements of the load cursor: a lane holds the ids of every 32nd page of a block."""
    pages = max(BLOCK_N // page_block_size, 1)
    return PAGE + -(-pages // _LANES)


def make_walk(
    config: KernelConfig, read_page_ids: Any, copy_q: Any, copy_block: Any, num_stages: int = NUM_STAGES
) -> tuple[Any, Any]:
    """Make the macros ``seek(cursor, t)`` and ``load(stage, parity, cursor, t)`` of the walk over all items.

    Parameters
    ----------
    config : KernelConfig
        Its ``short_piece`` and ``evict_normal_blocks``.
    read_page_ids : macro
        ``(cursor, t)``: those of the block that the cursor is at.
    copy_q, copy_block : macro
        ``(stage, cursor, t)`` and ``(stage, eviction_policy, cursor, t)``: the TMA loads of an item.
    num_stages : int
        Of the ring.
    """

    @T.macro
    def seek(cursor, t):
        # To the Q tile of the first request from cursor[PLACE] on that has blocks; past the last one if none has.
        cursor[END] = 0
        while (cursor[PLACE] <= t.part.end_place_inclusive) & (cursor[END] == 0):
            cursor[REQUEST] = request_of(cursor[PLACE], t)
            bounds = begin_and_end(cursor[PLACE], cursor[REQUEST], t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            if end > begin:
                cursor[BLOCK] = -1 - begin
                cursor[END] = end
                cursor[EVICT_FIRST] = 0
                if (end - begin > config.short_piece) & (cursor[PLACE] == t.part.begin_place):
                    cursor[EVICT_FIRST] = begin + config.evict_normal_blocks
            else:
                cursor[PLACE] += 1

    @T.macro
    def load(stage, parity, cursor, t):
        assume_stage(stage, num_stages)
        if cursor[PLACE] <= t.part.end_place_inclusive:
            T.barrier_wait(t.empty[stage], parity)
            if cursor[BLOCK] < 0:
                copy_q(stage, cursor, t)
                cursor[BLOCK] = -1 - cursor[BLOCK]
                read_page_ids(cursor, t)
            else:
                if cursor[BLOCK] >= cursor[EVICT_FIRST]:
                    copy_block(stage, "evict_first", cursor, t)
                else:
                    copy_block(stage, None, cursor, t)
                cursor[BLOCK] += 1
                if cursor[BLOCK] < cursor[END]:
                    read_page_ids(cursor, t)
                else:
                    cursor[PLACE] += 1
                    seek(cursor, t)

    return seek, load


def make_loader(page_block_size: int, head_dim_qk: int, config: KernelConfig) -> tuple[Any, Any]:
    """Make the macros ``seek(cursor, t)`` and ``load(stage, parity, cursor, t)``.

    Parameters
    ----------
    page_block_size : int
        Tokens of a page: a power of two. A block of 64 tokens is some pages or a part of one.
    head_dim_qk : int
        Columns of an item.
    config : KernelConfig
        Its ``short_piece`` and ``evict_normal_blocks``.
    """
    thirds = columns_of_thirds(head_dim_qk)
    pages = max(BLOCK_N // page_block_size, 1)  # of a block
    blocks = max(page_block_size // BLOCK_N, 1)  # of a page
    tokens = min(page_block_size, BLOCK_N)  # that one load brings
    ids = cursor_size(page_block_size) - PAGE  # of a lane
    tuple_of_ids = tuple(range(ids))
    # A load that is not as high as the block is as wide as the swizzle's atom.
    slices = [tuple(range(first, first + width, SLICE)) for _, first, width in thirds]

    @T.macro
    def read_page_ids(cursor, t):
        # Of block cursor[BLOCK], each lane its own. For pages that no query sees others stand in.
        if pages == 1:
            cursor[PAGE] = t.block_table[cursor[REQUEST], T.shift_right(cursor[BLOCK], blocks.bit_length() - 1)]
        else:
            seqlen = T.alloc_var("int32", init=t.cache_seqlens[cursor[REQUEST]])
            first_key = first_visible_key(seqlen, t.seq_len_q, t.window_left)
            first = T.alloc_var("int32", init=T.truncdiv(first_key, page_block_size))
            last = T.alloc_var("int32", init=T.truncdiv(seqlen - 1, page_block_size))
            for i in T.unroll(ids):
                page = cursor[BLOCK] * pages + i * _LANES + t.tx % min(pages, _LANES)
                cursor[PAGE + i] = t.block_table[cursor[REQUEST], T.min(T.max(page, first), last)]

    @T.macro
    def copy_q(stage, cursor, t):
        for i, first, width in thirds:
            T.tma_copy(
                t.q[cursor[REQUEST], t.head, t.tile[0] : t.tile[0] + ROWS, first : first + width],
                t.kv[stage, :, first : first + width],
                barrier=t.full[stage * NUM_THIRDS + i],
                leader_scope_threads=_LANES,
            )
            arrive_warp(t.full, stage * NUM_THIRDS + i, t.tx)

    @T.macro
    def copy_block(stage, eviction_policy, cursor, t):
        # How far into its page a block begins.
        token = T.bitwise_and(cursor[BLOCK], blocks - 1) * tokens if blocks > 1 else 0
        for i, first, width in thirds:
            if pages == 1:
                T.tma_copy(
                    t.kcache[cursor[PAGE], token : token + tokens, t.head, first : first + width],
                    t.kv[stage, :, first : first + width],
                    barrier=t.full[stage * NUM_THIRDS + i],
                    leader_scope_threads=_LANES,
                    eviction_policy=eviction_policy,
                )
            else:
                for k in tuple_of_ids:
                    for lane in T.unroll(min(pages, _LANES), annotations=NOT_UNROLLED):
                        page_id = T.alloc_var("int32", init=T.shfl_sync(cursor[PAGE + k], lane))
                        row = (k * _LANES + lane) * tokens
                        for column in slices[i]:
                            T.tma_copy(
                                t.kcache[page_id, 0:tokens, t.head, column : column + SLICE],
                                t.kv[stage, row : row + tokens, column : column + SLICE],
                                barrier=t.full[stage * NUM_THIRDS + i],
                                leader_scope_threads=_LANES,
                                eviction_policy=eviction_policy,
                            )
            arrive_warp(t.full, stage * NUM_THIRDS + i, t.tx)

    return make_walk(config, read_page_ids, copy_q, copy_block)

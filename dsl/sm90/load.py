"""The loading warp: where it is in the walk, and one TMA load of the next item."""

from typing import Any

import tilelang.language as T

from tilemla.config import KernelConfig
from tilemla.dsl.attention import page_index
from tilemla.dsl.schedule import end_block, first_block
from tilemla.dsl.sm90.tile import NUM_THIRDS, ROWS, arrive_warp, assume_stage

# The load cursor, a local int32 buffer: the next item to load. BLOCK is -1 when that is a Q tile; PAGE is read one item
# ahead, so that the latency of the block table is hidden.
REQUEST, BLOCK, END, PAGE, CURSOR_SIZE = range(5)


def make_loader(block_n: int, head_dim_qk: int, config: KernelConfig) -> tuple[Any, Any]:
    """Make the macros ``seek(cursor, t)`` and ``load(stage, parity, cursor, t)``.

    Parameters
    ----------
    block_n : int
        Tokens of a page.
    head_dim_qk : int
        Columns of an item.
    config : KernelConfig
        Its ``short_piece``.
    """
    third = head_dim_qk // NUM_THIRDS

    @T.macro
    def seek(cursor, t):
        # To the Q tile of the first request from cursor[REQUEST] on that has blocks; past the last one if none has.
        cursor[BLOCK] = -1
        cursor[END] = 0
        while (cursor[REQUEST] <= t.part.end_request_inclusive) & (cursor[END] == 0):
            end = end_block(t.part, cursor[REQUEST], t.cache_seqlens[cursor[REQUEST]], block_n)
            if end > first_block(t.part, cursor[REQUEST]):
                cursor[END] = end
            else:
                cursor[REQUEST] += 1

    @T.macro
    def copy_thirds(stage, source_of, eviction_policy, t):
        for i in T.unroll(NUM_THIRDS):
            T.tma_copy(
                source_of(i * third),
                t.kv[stage, :, i * third : i * third + third],
                barrier=t.full[stage * NUM_THIRDS + i],
                leader_scope_threads=32,
                eviction_policy=eviction_policy,
            )
            arrive_warp(t.full, stage * NUM_THIRDS + i, t.tx)

    @T.macro
    def copy_page(stage, eviction_policy, cursor, t):
        copy_thirds(
            stage,
            lambda first: t.kcache[cursor[PAGE], 0:block_n, t.head, first : first + third],
            eviction_policy,
            t,
        )

    @T.macro
    def load(stage, parity, cursor, t):
        assume_stage(stage)
        if cursor[REQUEST] <= t.part.end_request_inclusive:
            T.barrier_wait(t.empty[stage], parity)
            if cursor[BLOCK] < 0:
                copy_thirds(
                    stage,
                    lambda first: t.q[cursor[REQUEST], t.head, t.row0 : t.row0 + ROWS, first : first + third],
                    None,
                    t,
                )
                cursor[BLOCK] = first_block(t.part, cursor[REQUEST])
                cursor[PAGE] = page_index(t.block_table, cursor[REQUEST], cursor[BLOCK])
            else:
                if cursor[END] - first_block(t.part, cursor[REQUEST]) <= config.short_piece:
                    copy_page(stage, "evict_first", cursor, t)
                else:
                    copy_page(stage, None, cursor, t)
                cursor[BLOCK] += 1
                if cursor[BLOCK] < cursor[END]:
                    cursor[PAGE] = page_index(t.block_table, cursor[REQUEST], cursor[BLOCK])
                else:
                    cursor[REQUEST] += 1
                    seek(cursor, t)

    return seek, load

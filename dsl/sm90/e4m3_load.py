"""The TMA loads of the decode kernel over e4m3: an item is one barrier's, and a block is a page."""

from typing import Any

import tilelang.language as T

from tilemla.config import KernelConfig
from tilemla.dsl.attention import page_index
from tilemla.dsl.sm90.e4m3_tile import NUM_STAGES, ROPE_COLUMNS
from tilemla.dsl.sm90.load import BLOCK, PAGE, REQUEST, make_walk
from tilemla.dsl.sm90.tile import ROWS, arrive_warp

_LANES = 32


def make_loader(head_dim_v: int, config: KernelConfig) -> tuple[Any, Any]:
    """Make the macros ``seek(cursor, t)`` and ``load(stage, parity, cursor, t)``.

    Parameters
    ----------
    head_dim_v : int
        Latent columns of an item.
    config : KernelConfig
        Its ``short_piece`` and ``evict_normal_blocks``.
    """

    @T.macro
    def read_page_ids(cursor, t):
        cursor[PAGE] = page_index(t.block_table, cursor[REQUEST], cursor[BLOCK])

    @T.macro
    def copy_q(stage, cursor, t):
        for source, first, width in ((t.kv, 0, head_dim_v), (t.rope, head_dim_v, ROPE_COLUMNS)):
            T.tma_copy(
                t.q[cursor[REQUEST], t.head, t.tile[0] : t.tile[0] + ROWS, first : first + width],
                source[stage, :, :],
                barrier=t.full[stage],
                leader_scope_threads=_LANES,
            )
        arrive_warp(t.full, stage, t.tx)

    @T.macro
    def copy_block(stage, eviction_policy, cursor, t):
        for source, first, width in ((t.kv, 0, head_dim_v), (t.rope, head_dim_v, ROPE_COLUMNS)):
            T.tma_copy(
                t.kcache[cursor[PAGE], 0:ROWS, t.head, first : first + width],
                source[stage, :, :],
                barrier=t.full[stage],
                leader_scope_threads=_LANES,
                eviction_policy=eviction_policy,
            )
        arrive_warp(t.full, stage, t.tx)

    return make_walk(config, read_page_ids, copy_q, copy_block, NUM_STAGES)

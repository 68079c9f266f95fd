"""Read the pages of a call and do nothing with them: what decode costs at least where memory bounds it.

A CTA of one warp walks one part of a schedule for one KV head, as the loading warp of the decode kernel does (`load`),
with the same tensor map and the same ring of stages. Nobody waits for a page but the next load into its stage. No
compiler drops these loads: they write shared memory.

A stage is refilled as a whole. By thirds, under a barrier each, it takes 3 us more of 408 where it reads 1.2 GB on an
H100, by ninths 6, and with ``evict_first`` 16.
"""

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from tilemla.dsl.attention import page_index
from tilemla.dsl.program import Program
from tilemla.dsl.schedule import NUM_COLUMNS, end_block, first_block, read_part, request_at
from tilemla.dsl.sm90.tile import NUM_STAGES, arrive_warp, next_turn, phase_of, stage_of

_WARP = 32
# One warp does everything, and every index is in bounds by construction.
_PASS_CONFIG = {
    "tl.disable_warp_specialized": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_data_race_check": True,
    "tl.disable_safe_memory_legalize": True,
}


def make_read_program(spec) -> Program:
    """Make the kernel that reads the pages of a call.

    Parameters
    ----------
    spec : KernelSpec
        Of kernel ``"read_pages"`` and architecture ``"sm_90a"``.

    Returns
    -------
    Program
        ``read_pages(kcache (num_blocks, page_block_size, h_k, head_dim_qk), block_table (b, max_num_blocks_per_seq)
        int32, cache_seqlens (b,) int32, tile_scheduler_metadata (num_sm_parts, 8) int32)``, as those of ``mla_decode``.
    """
    dtype, block_n, head_dim_qk = spec.dtype, spec.page_block_size, spec.head_dim_qk
    b, h_k, num_blocks, max_num_blocks_per_seq = T.dynamic("b, h_k, num_blocks, max_num_blocks_per_seq")
    k_stride_page, k_stride_token, k_stride_h = T.dynamic("k_stride_page, k_stride_token, k_stride_h")
    table_stride_b, num_sm_parts = T.dynamic("table_stride_b, num_sm_parts")

    @T.prim_func
    def read_pages(
        kcache: T.StridedTensor(
            (num_blocks, block_n, h_k, head_dim_qk), (k_stride_page, k_stride_token, k_stride_h, 1), dtype
        ),
        block_table: T.StridedTensor((b, max_num_blocks_per_seq), (table_stride_b, 1), "int32"),
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, NUM_COLUMNS), "int32"),
    ):
        with T.Kernel(h_k, num_sm_parts, threads=_WARP) as (head, part_index):
            kv = T.alloc_shared((NUM_STAGES, block_n, head_dim_qk), dtype)
            T.annotate_layout({kv: make_swizzled_layout(kv)})  # what the decode kernel's products ask for
            full = T.alloc_barrier([1] * NUM_STAGES)
            tx = T.get_thread_binding()
            part = read_part(tile_scheduler_metadata, part_index)
            begin_place = part.begin_place
            end_place_inclusive = part.end_place_inclusive
            turn = T.alloc_var("int32", init=0)
            pages = T.alloc_var("int32", init=0)  # of a thread: one of the next 32
            for place in T.serial(begin_place, end_place_inclusive + 1):
                request = T.alloc_var("int32", init=request_at(tile_scheduler_metadata, place))
                first = first_block(part, place)
                end = end_block(part, place, cache_seqlens[request], block_n)
                for block in T.serial(first, end):
                    if (block - first) % _WARP == 0:
                        pages = page_index(block_table, request, T.min(block + tx, end - 1))
                    page = T.shfl_sync(pages, (block - first) % _WARP)
                    stage = stage_of(turn)
                    # For what was loaded there before; a barrier that was never used lets pass.
                    T.barrier_wait(full[stage], 1 - phase_of(turn))
                    T.tma_copy(
                        kcache[page, 0:block_n, head, 0:head_dim_qk],
                        kv[stage, :, :],
                        barrier=full[stage],
                        leader_scope_threads=_WARP,
                    )
                    arrive_warp(full, stage, tx)
                    turn = next_turn(turn)
            # Shared memory must stay while loads into it are under way.
            for _ in T.serial(NUM_STAGES):
                T.barrier_wait(full[stage_of(turn)], 1 - phase_of(turn))
                turn = next_turn(turn)

    return Program(read_pages, _PASS_CONFIG)

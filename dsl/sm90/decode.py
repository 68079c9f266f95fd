"""Dense paged split-KV MLA decode for sm_90a: TMA page loads, wgmma, a persistent walk of the schedule.

A CTA of three warpgroups walks the requests of one part of the schedule, for one tile of 64 query rows and one KV head:

- the score warpgroup multiplies Q, most of which it holds in registers, with a page, takes the online softmax and hands
  P over through the rope columns of the page's stage, which are dead by then (`score`); it also says when the combine
  kernel may be launched;
- two output warpgroups multiply P with the left and the right 256 columns of the page and hold the output tile
  (`output`);
- one warp of the right output warpgroup issues every TMA load, three items ahead (`load`).

Q tiles go through the same ring of three stages as the pages, so that the next request is loading while the last one is
written out. The combine kernel is launched under the tail of this one (`combine`).
"""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl.program import Program
from tilemla.dsl.schedule import BLOCK_N, NUM_COLUMNS, read_part
from tilemla.dsl.sm90.combine import make_combine
from tilemla.dsl.sm90.load import cursor_size
from tilemla.dsl.sm90.output import make_output_warpgroups
from tilemla.dsl.sm90.score import make_score_warpgroup
from tilemla.dsl.sm90.tile import (
    K_STEP,
    NUM_STAGES,
    NUM_THIRDS,
    NUM_THREADS,
    OUTPUT_REGISTERS,
    Q_STEPS_IN_REGISTERS,
    ROWS,
    SCORE_REGISTERS,
    STAGE_COLUMNS,
    WARPGROUP,
)
from tilemla.dsl.sm90.way_out import INTERLEAVED
from tilemla.dsl.sm90.way_out_source import WAY_OUT_SOURCE

MAX_GRID_Y = 65535  # CUDA's limit for a grid's second axis

# The schedule is written by hand, and every index is in bounds by construction (rows are guarded where stored).
PASS_CONFIG = {
    "tl.disable_warp_specialized": True,
    "tl.disable_thread_storage_sync": True,
    "tl.disable_data_race_check": True,
    "tl.disable_safe_memory_legalize": True,
    "tl.enable_fast_math": True,
    "tilemla.disable_fence_injection": True,  # who writes a tile for the async proxy fences it before it arrives
}


def make_decode_program(spec, config) -> Program:
    """Make the split-KV decode and combine kernels of a spec.

    Parameters
    ----------
    spec : KernelSpec
        Of architecture ``"sm_90a"``.
    config : KernelConfig
        The constants that are tuned.

    Returns
    -------
    Program
        ``mla_decode``, of the parameters that ``tilemla.dsl.make_programs`` lists.
    """
    dtype, accum = spec.dtype, "float32"
    page_block_size, head_dim_v, head_dim_qk = spec.page_block_size, spec.head_dim_v, spec.head_dim_qk
    num_tail_steps = head_dim_qk // K_STEP - Q_STEPS_IN_REGISTERS
    b, h_k, rows, num_blocks, max_num_blocks_per_seq = T.dynamic("b, h_k, rows, num_blocks, max_num_blocks_per_seq")
    num_sm_parts, len_num_splits, max_num_splits = T.dynamic("num_sm_parts, len_num_splits, max_num_splits")
    q_stride_b, q_stride_h, q_stride_row = T.dynamic("q_stride_b, q_stride_h, q_stride_row")
    k_stride_page, k_stride_token, k_stride_h = T.dynamic("k_stride_page, k_stride_token, k_stride_h")
    table_stride_b, sink_group = T.dynamic("table_stride_b, sink_group")
    score_warpgroup = make_score_warpgroup(dtype, head_dim_qk, head_dim_v, config)
    output_warpgroups = make_output_warpgroups(page_block_size, head_dim_qk, head_dim_v, config)
    combine = make_combine(head_dim_v, accum, config, early=True, interleaved=INTERLEAVED)
    sizes = SimpleNamespace(batch_size=b, num_heads_k=h_k, rows=rows)

    @T.prim_func
    def mla_decode(
        q: T.StridedTensor((b, h_k, rows, head_dim_qk), (q_stride_b, q_stride_h, q_stride_row, 1), dtype),
        kcache: T.StridedTensor(
            (num_blocks, page_block_size, h_k, head_dim_qk), (k_stride_page, k_stride_token, k_stride_h, 1), dtype
        ),
        block_table: T.StridedTensor((b, max_num_blocks_per_seq), (table_stride_b, 1), "int32"),
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((len_num_splits,), "int32"),
        out: T.Tensor((b, h_k, rows, head_dim_v), dtype),
        softmax_lse: T.Tensor((b, h_k, rows), accum),
        out_accum: T.Tensor((max_num_splits, h_k, rows, head_dim_v), accum),
        lse_accum_log2: T.Tensor((max_num_splits, h_k, rows), accum),
        attn_sink: T.Tensor((h_k, sink_group), accum),
        softmax_scale_log2: T.float32,
        lse_scale: T.float32,
        seq_len_q: T.int32,
        group_size: T.int32,
        window_left: T.int32,
        window_right: T.int32,
        has_sink: T.int32,
    ):
        # Tiles of a part lie side by side: they read the same pages.
        with T.Kernel(
            T.ceildiv(rows, ROWS),
            T.min(num_sm_parts, MAX_GRID_Y),
            h_k * T.ceildiv(num_sm_parts, MAX_GRID_Y),
            threads=NUM_THREADS,
            prelude=WAY_OUT_SOURCE,
        ) as (row_tile, part_of_layer, head_and_layer):
            kv = T.alloc_shared((NUM_STAGES, BLOCK_N, STAGE_COLUMNS), dtype)
            q_tail = T.alloc_shared((num_tail_steps * ROWS * K_STEP,), dtype)
            alpha = T.alloc_shared((2, ROWS), accum, scope="shared")
            inverse_sums = T.alloc_shared((ROWS,), accum, scope="shared")
            tile = T.alloc_shared((3,), "int32", scope="shared")  # its first row, head and part
            full = T.alloc_barrier([1] * NUM_THIRDS * NUM_STAGES)  # a warp loaded
            empty = T.alloc_barrier([8] * NUM_STAGES)  # the warps that multiply with V are done
            p_full = T.alloc_barrier([4] * NUM_STAGES)  # the warps that make P are done

            tx = T.get_thread_binding()
            # Heads share the grid's third axis with what parts the second is too short for.
            layer_head = T.alloc_var("int32", init=head_and_layer)
            part_index = T.alloc_var("int32", init=part_of_layer)
            while layer_head >= h_k:
                layer_head -= h_k
                part_index += MAX_GRID_Y
            line = T.alloc_var("int32", init=T.min(part_index, num_sm_parts - 1))
            part = read_part(tile_scheduler_metadata, line)
            # The walk's bounds stay in registers, the rest of the row is read where it is wanted.
            begin_place = part.begin_place
            end_place_inclusive = T.Select(part_index < num_sm_parts, part.end_place_inclusive, -1)
            begin_block = part.begin_block
            last_end_block = part.end_block
            if tx == 0:
                tile[0] = row_tile * ROWS
                tile[1] = layer_head
                tile[2] = line
            T.sync_threads()
            t = SimpleNamespace(
                q=q,
                kcache=kcache,
                block_table=block_table,
                cache_seqlens=cache_seqlens,
                order=tile_scheduler_metadata,
                num_splits=num_splits,
                out=out,
                softmax_lse=softmax_lse,
                out_accum=out_accum,
                lse_accum_log2=lse_accum_log2,
                softmax_scale_log2=softmax_scale_log2,
                lse_scale=lse_scale,
                attn_sink=attn_sink,
                has_sink=has_sink,
                window_left=window_left,
                window_right=window_right,
                kv=kv,
                q_tail=q_tail,
                alpha=alpha,
                inverse_sum=inverse_sums,
                tile=tile,
                full=full,
                empty=empty,
                p_full=p_full,
                tx=tx,
                rows=rows,
                head=tile[1],
                group_size=group_size,
                seq_len_q=seq_len_q,
                part=read_part(tile_scheduler_metadata, tile[2])._replace(
                    begin_place=begin_place,
                    end_place_inclusive=end_place_inclusive,
                    begin_block=begin_block,
                    end_block=last_end_block,
                ),
            )
            if tx < WARPGROUP:
                T.set_max_nreg(SCORE_REGISTERS, 1)
                score_warpgroup(t)
            else:
                T.set_max_nreg(OUTPUT_REGISTERS, 0)
                acc = T.alloc_fragment((ROWS, head_dim_v), accum)
                cursor = T.alloc_local((cursor_size(page_block_size),), "int32")
                output_warpgroups(acc, cursor, t)

        merging = SimpleNamespace(
            out_accum=out_accum,
            lse_accum_log2=lse_accum_log2,
            num_splits=num_splits,
            out=out,
            softmax_lse=softmax_lse,
            attn_sink=attn_sink,
            group_size=group_size,
            has_sink=has_sink,
            lse_scale=lse_scale,
        )
        combine(merging, sizes)

    return Program(mla_decode, PASS_CONFIG)

"""Dense paged split-KV MLA decode over e4m3 for sm_90a: queries and pages in bytes, with one scale each.

A CTA of three warpgroups walks the requests of one part of the schedule, as in `decode`:

- the score warpgroup multiplies Q, which it holds in registers, with a page as e4m3, takes the online softmax and hands
  P over as float16 (`e4m3_score`);
- two output warpgroups widen the left and the right 256 columns of the page in registers, multiply them with P and hold
  the output tile, transposed (`e4m3_output`);
- one warp of the right output warpgroup issues every TMA load, three items ahead (`e4m3_load`).

Products with P are those of exact values: the results are as far from the true ones as those of a 16-bit cache are.
The scales are factors of the softmax's scale and of the output.
"""

from types import SimpleNamespace

import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from tilemla.dsl.attention import descale_scores
from tilemla.dsl.program import Program
from tilemla.dsl.schedule import BLOCK_N, NUM_COLUMNS, read_part
from tilemla.dsl.sm90.combine import make_combine
from tilemla.dsl.sm90.decode import MAX_GRID_Y, PASS_CONFIG
from tilemla.dsl.sm90.e4m3_output import make_output_warpgroups
from tilemla.dsl.sm90.e4m3_score import make_score_warpgroup
from tilemla.dsl.sm90.e4m3_source import E4M3_SOURCE
from tilemla.dsl.sm90.e4m3_tile import (
    ATOM_COLUMNS,
    EMPTY_ARRIVALS,
    NUM_SLOTS,
    NUM_STAGES,
    OUTPUT_REGISTERS,
    ROPE_COLUMNS,
    SCORE_REGISTERS,
    TAIL_ATOMS,
)
from tilemla.dsl.sm90.load import cursor_size
from tilemla.dsl.sm90.tile import NUM_THREADS, ROWS, WARPGROUP


def make_decode_program(spec, config) -> Program:
    """Make the split-KV decode and combine kernels of a spec.

    Parameters
    ----------
    spec : KernelSpec
        Of architecture ``"sm_90a"`` and ``kv_format="dense_fp8"``.
    config : KernelConfig
        The constants that are tuned.

    Returns
    -------
    Program
        ``mla_decode``, of the parameters that `tilemla.dsl.decode_cpu.make_decode_program` lists.
    """
    accum = "float32"
    page_block_size, head_dim_v, head_dim_qk = spec.page_block_size, spec.head_dim_v, spec.head_dim_qk
    b, h_k, rows, num_blocks, max_num_blocks_per_seq = T.dynamic("b, h_k, rows, num_blocks, max_num_blocks_per_seq")
    num_sm_parts, len_num_splits, max_num_splits = T.dynamic("num_sm_parts, len_num_splits, max_num_splits")
    q_stride_b, q_stride_h, q_stride_row = T.dynamic("q_stride_b, q_stride_h, q_stride_row")
    k_stride_page, k_stride_token, k_stride_h = T.dynamic("k_stride_page, k_stride_token, k_stride_h")
    table_stride_b, sink_group = T.dynamic("table_stride_b, sink_group")
    score_warpgroup = make_score_warpgroup(head_dim_v)
    output_warpgroups = make_output_warpgroups(head_dim_v, config)
    combine = make_combine(head_dim_v, accum, config, early=True)
    sizes = SimpleNamespace(batch_size=b, num_heads_k=h_k, rows=rows)

    @T.prim_func
    def mla_decode(
        q: T.StridedTensor((b, h_k, rows, head_dim_qk), (q_stride_b, q_stride_h, q_stride_row, 1), "uint8"),
        kcache: T.StridedTensor(
            (num_blocks, page_block_size, h_k, head_dim_qk), (k_stride_page, k_stride_token, k_stride_h, 1), "uint8"
        ),
        block_table: T.StridedTensor((b, max_num_blocks_per_seq), (table_stride_b, 1), "int32"),
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((len_num_splits,), "int32"),
        out: T.Tensor((b, h_k, rows, head_dim_v), spec.dtype),
        softmax_lse: T.Tensor((b, h_k, rows), accum),
        out_accum: T.Tensor((max_num_splits, h_k, rows, head_dim_v), accum),
        lse_accum_log2: T.Tensor((max_num_splits, h_k, rows), accum),
        attn_sink: T.Tensor((h_k, sink_group), accum),
        descale_q: T.Tensor((1,), accum),
        descale_k: T.Tensor((1,), accum),
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
            prelude=E4M3_SOURCE,
        ) as (row_tile, part_of_layer, head_and_layer):
            kv = T.alloc_shared((NUM_STAGES, BLOCK_N, head_dim_v), "uint8")
            rope = T.alloc_shared((NUM_STAGES, BLOCK_N, ROPE_COLUMNS), "uint8")
            p = T.alloc_shared((NUM_SLOTS, ROWS, BLOCK_N), "float16")
            out_tile = T.alloc_shared((ROWS, head_dim_v // 2), spec.dtype)
            q_tail = T.alloc_shared((ROWS, TAIL_ATOMS * ATOM_COLUMNS), "uint8")
            T.annotate_layout({buffer: make_swizzled_layout(buffer) for buffer in (kv, rope, p, out_tile, q_tail)})
            alpha = T.alloc_shared((NUM_SLOTS, ROWS), accum, scope="shared")
            inverse_sums = T.alloc_shared((NUM_SLOTS, ROWS), accum, scope="shared")
            value_scale = T.alloc_shared((1,), accum, scope="shared")
            # Its first row, head and part, and the part's bounds: no warpgroup has registers for them.
            tile = T.alloc_shared((7,), "int32", scope="shared")
            full = T.alloc_barrier([1] * NUM_STAGES)  # a warp loaded
            empty = T.alloc_barrier([EMPTY_ARRIVALS] * NUM_STAGES)
            p_full = T.alloc_barrier([4] * NUM_SLOTS)  # the warps that make P are done
            p_empty = T.alloc_barrier([8] * NUM_SLOTS)  # the warps that multiply with it are done

            tx = T.get_thread_binding()
            # Heads share the grid's third axis with what parts the second is too short for.
            layer_head = T.alloc_var("int32", init=head_and_layer)
            part_index = T.alloc_var("int32", init=part_of_layer)
            while layer_head >= h_k:
                layer_head -= h_k
                part_index += MAX_GRID_Y
            line = T.alloc_var("int32", init=T.min(part_index, num_sm_parts - 1))
            T.pdl_trigger()
            if tx == 0:
                part = read_part(tile_scheduler_metadata, line)
                tile[0] = row_tile * ROWS
                tile[1] = layer_head
                tile[2] = line
                tile[3] = part.begin_place
                tile[4] = T.if_then_else(part_index < num_sm_parts, part.end_place_inclusive, -1)
                tile[5] = part.begin_block
                tile[6] = part.end_block
                value_scale[0] = descale_k[0]
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
                lse_scale=lse_scale,
                attn_sink=attn_sink,
                has_sink=has_sink,
                window_left=window_left,
                window_right=window_right,
                kv=kv,
                rope=rope,
                p=p,
                out_tile=out_tile,
                q_tail=q_tail,
                alpha=alpha,
                inverse_sum=inverse_sums,
                value_scale=value_scale,
                tile=tile,
                full=full,
                empty=empty,
                p_full=p_full,
                p_empty=p_empty,
                tx=tx,
                rows=rows,
                head=tile[1],
                group_size=group_size,
                seq_len_q=seq_len_q,
                part=read_part(tile_scheduler_metadata, tile[2])._replace(
                    begin_place=tile[3],
                    end_place_inclusive=tile[4],
                    begin_block=tile[5],
                    end_block=tile[6],
                ),
            )
            if tx < WARPGROUP:
                T.set_max_nreg(SCORE_REGISTERS, 0)
                score_scale = T.alloc_var(accum, init=descale_scores(softmax_scale_log2, descale_q[0], descale_k[0]))
                score_warpgroup(score_scale, t)
            else:
                T.set_max_nreg(OUTPUT_REGISTERS, 1)
                cursor = T.alloc_local((cursor_size(page_block_size),), "int32")
                output_warpgroups(cursor, t)

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

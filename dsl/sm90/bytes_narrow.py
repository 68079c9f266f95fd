"""Paged split-KV MLA decode for sm_90a over an FP8 cache of 656 bytes a token, for few query rows.

A CTA walks the schedule as that of `decode` does, for one tile of 16 query rows:

- two consumer warpgroups take its pages in turn, each with outputs, maximum and sum of its own, which they merge at the
  end of a request (`narrow_consumer`);
- a warp copies the pages as they lie in memory, four stages ahead (`narrow_load`).

Memory is what bounds it: a page is converted in registers as it is multiplied, and never written to shared memory.
"""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl.program import Program
from tilemla.dsl.schedule import NUM_COLUMNS, read_part
from tilemla.dsl.sm90.combine import make_combine
from tilemla.dsl.sm90.decode import MAX_GRID_Y, PASS_CONFIG
from tilemla.dsl.sm90.e4m3_source import E4M3_SOURCE
from tilemla.dsl.sm90.narrow_consumer import make_consumer
from tilemla.dsl.sm90.narrow_load import make_load_warp
from tilemla.dsl.sm90.narrow_out import INTERLEAVED
from tilemla.dsl.sm90.narrow_source import NARROW_SOURCE
from tilemla.dsl.sm90.narrow_tile import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    LOAD_REGISTERS,
    NUM_STAGES,
    NUM_THREADS,
    NUM_WARPGROUPS,
    OWN_FLOATS,
    PAGE_BYTES,
    ROWS,
)
from tilemla.kv_formats import FP8_LAYOUTS


def make_decode_program(spec, config) -> Program:
    """Make the split-KV decode and combine kernels of a spec.

    Parameters
    ----------
    spec : KernelSpec
        Of architecture ``"sm_90a"`` and ``kv_format="fp8_656"``.
    config : KernelConfig
        What the combine kernel is tuned by.

    Returns
    -------
    Program
        ``mla_decode_narrow``, of the parameters that `bytes_decode.make_decode_program` lists. It serves any number of
        rows, and reads every page once for each 16 of them.
    """
    dtype, accum = spec.dtype, "float32"
    head_dim_v, head_dim_qk = spec.head_dim_v, spec.head_dim_qk
    layout = FP8_LAYOUTS[spec.kv_format]
    b, h_k, rows, num_blocks, max_num_blocks_per_seq = T.dynamic("b, h_k, rows, num_blocks, max_num_blocks_per_seq")
    num_sm_parts, len_num_splits, max_num_splits = T.dynamic("num_sm_parts, len_num_splits, max_num_splits")
    q_stride_b, q_stride_h, q_stride_row = T.dynamic("q_stride_b, q_stride_h, q_stride_row")
    k_stride_page, k_stride_token, k_stride_h = T.dynamic("k_stride_page, k_stride_token, k_stride_h")
    table_stride_b, sink_group = T.dynamic("table_stride_b, sink_group")
    consumer = make_consumer(head_dim_qk, head_dim_v)
    load_warp = make_load_warp(head_dim_qk)
    combine = make_combine(head_dim_v, accum, config, early=True, interleaved=INTERLEAVED)
    sizes = SimpleNamespace(batch_size=b, num_heads_k=h_k, rows=rows)

    @T.prim_func
    def mla_decode_narrow(
        q: T.StridedTensor((b, h_k, rows, head_dim_qk), (q_stride_b, q_stride_h, q_stride_row, 1), dtype),
        kcache: T.StridedTensor(
            (num_blocks, spec.page_block_size, h_k, layout.bytes_per_token),
            (k_stride_page, k_stride_token, k_stride_h, 1),
            "uint8",
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
        with T.Kernel(
            T.ceildiv(rows, ROWS),
            T.min(num_sm_parts, MAX_GRID_Y),
            h_k * T.ceildiv(num_sm_parts, MAX_GRID_Y),
            threads=NUM_THREADS,
            prelude=E4M3_SOURCE + NARROW_SOURCE,
        ) as (row_tile, part_of_layer, head_and_layer):
            pages = T.alloc_shared((NUM_STAGES * PAGE_BYTES,), "uint8")
            q_tile = T.alloc_shared((ROWS * head_dim_qk,), dtype)
            own = T.alloc_shared((NUM_WARPGROUPS, OWN_FLOATS), accum)
            q_factors = T.alloc_shared((ROWS,), accum, scope="shared")  # of the latent columns as they are stored
            maxima = T.alloc_shared((NUM_WARPGROUPS, 4, ROWS), accum, scope="shared")  # of a block, of each warp
            sums = T.alloc_shared((NUM_WARPGROUPS, 4, ROWS), accum, scope="shared")
            last_maxima = T.alloc_shared((NUM_WARPGROUPS, ROWS), accum, scope="shared")
            tile = T.alloc_shared((3,), "int32", scope="shared")  # its first row, head and part
            full = T.alloc_barrier([1] * NUM_STAGES)  # a page is there
            empty = T.alloc_barrier([4] * NUM_STAGES)  # the warps that read it are done
            q_full = T.alloc_barrier([CONSUMERS // 32])  # the warps that bring Q are done

            tx = T.get_thread_binding()
            # Heads share the grid's third axis with what parts the second is too short for.
            layer_head = T.alloc_var("int32", init=head_and_layer)
            part_index = T.alloc_var("int32", init=part_of_layer)
            while layer_head >= h_k:
                layer_head -= h_k
                part_index += MAX_GRID_Y
            line = T.alloc_var("int32", init=T.min(part_index, num_sm_parts - 1))
            part = read_part(tile_scheduler_metadata, line)
            begin_place = part.begin_place
            end_place_inclusive = T.Select(part_index < num_sm_parts, part.end_place_inclusive, -1)
            begin_block = part.begin_block
            last_end_block = part.end_block
            T.pdl_trigger()
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
                token_stride=k_stride_token,
                pages=pages,
                q_tile=q_tile,
                q_factors=q_factors,
                own=own,
                maxima=maxima,
                sums=sums,
                last_maxima=last_maxima,
                tile=tile,
                full=full,
                empty=empty,
                q_full=q_full,
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
            if tx < CONSUMERS:
                T.set_max_nreg(CONSUMER_REGISTERS, 1)
                consumer(t)
            else:
                T.set_max_nreg(LOAD_REGISTERS, 0)
                if tx < CONSUMERS + 32:
                    load_warp(t)

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

    return Program(mla_decode_narrow, PASS_CONFIG)

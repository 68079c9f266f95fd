"""Paged split-KV MLA decode for sm_90a over an FP8 cache in bytes: the frame of sparse decode with a block table.

A CTA walks the schedule as that of `decode` does, for one tile of 64 query rows. A producer warpgroup converts the
tokens of a page (`gather_fp8`); those that no query sees, whatever their bytes are, become zeros. Scores and outputs
are made as in `sparse_decode`, with the mask of `mask`.
"""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl.attention import first_visible_key, page_index
from tilemla.dsl.program import Program
from tilemla.dsl.schedule import BLOCK_N, NUM_COLUMNS, read_part
from tilemla.dsl.sm90.combine import make_combine
from tilemla.dsl.sm90.decode import MAX_GRID_Y, PASS_CONFIG
from tilemla.dsl.sm90.gather import BLOCK, EXTRA_LENGTH, LENGTH, make_walk, request_of_cursor
from tilemla.dsl.sm90.gather_fp8 import RAW_SCALES_SHAPE, RAW_SHAPE, make_fp8_producer
from tilemla.dsl.sm90.gather_source import GATHER_SOURCE
from tilemla.dsl.sm90.mask import hide_scores
from tilemla.dsl.sm90.roles import make_roles
from tilemla.dsl.sm90.softmax import make_softmax
from tilemla.dsl.sm90.sparse_output import make_output_warpgroup
from tilemla.dsl.sm90.sparse_score import make_score_warpgroup
from tilemla.dsl.sm90.sparse_tile import (
    EMPTY_ARRIVALS,
    FULL_ARRIVALS,
    NUM_STAGES,
    NUM_THREADS,
    NUM_WARPS,
    QUARTER,
)
from tilemla.dsl.sm90.tile import ROWS, STAGE_COLUMNS, begin_and_end
from tilemla.dsl.sm90.way_out import INTERLEAVED, make_way_out
from tilemla.dsl.sm90.way_out_source import WAY_OUT_SOURCE
from tilemla.kv_formats import FP8_LAYOUTS

# Where the cursor of the walk keeps the first key that some query sees; LENGTH is one past the last.
_FIRST_KEY = EXTRA_LENGTH


def make_decode_program(spec, config) -> Program:
    """Make the split-KV decode and combine kernels of a spec.

    Parameters
    ----------
    spec : KernelSpec
        Of architecture ``"sm_90a"``, with a ``kv_format`` of bytes and pages of 64 tokens.
    config : KernelConfig
        What the combine kernel is tuned by.

    Returns
    -------
    Program
        ``mla_decode``, of the parameters that the CPU's has. The cache begins, and its tokens, pages and heads are
        apart, by multiples of 16 bytes.
    """
    dtype, accum = spec.dtype, "float32"
    head_dim_v, head_dim_qk = spec.head_dim_v, spec.head_dim_qk
    layout = FP8_LAYOUTS[spec.kv_format]
    b, h_k, rows, num_blocks, max_num_blocks_per_seq = T.dynamic("b, h_k, rows, num_blocks, max_num_blocks_per_seq")
    num_sm_parts, len_num_splits, max_num_splits = T.dynamic("num_sm_parts, len_num_splits, max_num_splits")
    q_stride_b, q_stride_h, q_stride_row = T.dynamic("q_stride_b, q_stride_h, q_stride_row")
    k_stride_page, k_stride_token, k_stride_h = T.dynamic("k_stride_page, k_stride_token, k_stride_h")
    table_stride_b, sink_group = T.dynamic("table_stride_b, sink_group")

    def blocks_of(place, request, t):
        bounds = begin_and_end(place, request, t)
        seqlen = t.cache_seqlens[request]
        return SimpleNamespace(
            begin=bounds.begin,
            end=bounds.end,
            main=0,
            length=seqlen,
            extra_length=first_visible_key(seqlen, t.seq_len_q, t.window_left),
        )

    @T.macro
    def read_index(index, cursor, token, t):
        # A page, and the token of it.
        key = T.alloc_var("int32", init=cursor[BLOCK] * BLOCK_N + token)
        if (key >= cursor[_FIRST_KEY]) & (key < cursor[LENGTH]):
            index[0] = page_index(t.block_table, request_of_cursor(cursor, t), cursor[BLOCK])
            index[1] = token

    @T.macro
    def address(place, index, t):
        place[0] = 0
        if index[0] >= 0:
            place[0] = T.call_extern(
                "int64", "tilemla::address_of", T.address_of(t.kcache[index[0], index[1], t.head, 0])
            )

    @T.macro
    def mask(scores, request, block, stage, row, column, t):
        hide_scores(scores, request, block, row, column, t)

    softmax = make_softmax(
        head_dim_v,
        alpha_slot=lambda _block, stage: stage,
        inverse_sum_index=lambda stage, row: stage * ROWS + row,
        read_sink=lambda row, t: t.attn_sink[t.head, T.truncmod(t.tile[0] + row, t.group_size)],
    )

    @T.macro
    def write_sums(place, request, row, half, row_sum, running_max, t):
        softmax.write_lse(place, request, row, row_sum[half], running_max[half], t)

    def q_tile(request, t):
        return t.q[request, t.head, t.tile[0] : t.tile[0] + ROWS, 0:head_dim_qk]

    play = make_roles(
        make_score_warpgroup(dtype, head_dim_qk, softmax, blocks_of, write_sums, mask=mask),
        make_output_warpgroup(head_dim_v, make_way_out(QUARTER), blocks_of),
        make_fp8_producer(layout, make_walk(blocks_of, read_index, address)),
    )
    combine = make_combine(head_dim_v, accum, config, early=True, interleaved=INTERLEAVED)
    sizes = SimpleNamespace(batch_size=b, num_heads_k=h_k, rows=rows)

    @T.prim_func
    def mla_decode(
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
            prelude=GATHER_SOURCE + WAY_OUT_SOURCE,
        ) as (row_tile, part_of_layer, head_and_layer):
            kv = T.alloc_shared((NUM_STAGES + 1, BLOCK_N, STAGE_COLUMNS), dtype)
            alpha = T.alloc_shared((NUM_STAGES, ROWS), accum, scope="shared")
            inverse_sums = T.alloc_shared((NUM_STAGES * ROWS,), accum, scope="shared")
            raw = T.alloc_shared(RAW_SHAPE, "uint32", scope="shared")  # bytes that are converted next
            raw_scales = T.alloc_shared(RAW_SCALES_SHAPE, "uint32", scope="shared")
            valid = T.alloc_shared((NUM_STAGES, NUM_WARPS), "int32", scope="shared")
            tile = T.alloc_shared((3,), "int32", scope="shared")  # its first row, head and part
            full = T.alloc_barrier(FULL_ARRIVALS)  # a piece of a block is there
            empty = T.alloc_barrier(EMPTY_ARRIVALS)  # who multiplies with a piece of V, or with P, is done
            p_full = T.alloc_barrier([NUM_WARPS] * NUM_STAGES)  # the warps that make P are done
            q_full = T.alloc_barrier([1])

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
            if tx == 0:
                tile[0] = row_tile * ROWS
                tile[1] = layer_head
                tile[2] = line
            T.sync_threads()
            t = SimpleNamespace(
                q=q,
                q_tile=q_tile,
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
                alpha=alpha,
                inverse_sum=inverse_sums,
                raw=raw,
                raw_scales=raw_scales,
                valid=valid,
                tile=tile,
                full=full,
                empty=empty,
                p_full=p_full,
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
            play(t)

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

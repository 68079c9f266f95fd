"""Paged split-KV MLA decode and combine in C: the math of the GPU kernel over local fp32 tiles."""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl import attention, combine, schedule
from tilemla.dsl.program import Program
from tilemla.dsl.specialise import fix_arguments
from tilemla.dsl.tile_cpu import BLOCK_N, make_tile_macros
from tilemla.dsl.tokens_cpu import make_token_reader, scale_in_token, storage_of, widen, widen_e4m3
from tilemla.kv_formats import FP8_LAYOUTS


def make_decode_program(spec) -> Program:
    """Split-KV decode and combine.

    Parameters
    ----------
    spec : KernelSpec
        With ``arch="cpu"``.

    Returns
    -------
    Program
        ``mla_decode(q (b, h_k, rows, head_dim_qk), kcache (num_blocks, page_block_size, h_k, head_dim_qk),
        block_table (b, max_num_blocks_per_seq), cache_seqlens (b,), tile_scheduler_metadata (num_sm_parts, 8),
        num_splits (b + 1 or longer,), out (b, h_k, rows, head_dim_v), softmax_lse (b, h_k, rows),
        out_accum (max_num_splits, h_k, rows, head_dim_v), lse_accum_log2 (max_num_splits, h_k, rows),
        attn_sink (h_k, group_size), softmax_scale_log2, lse_scale, seq_len_q, group_size, window_left, window_right,
        has_sink)`` with ``rows = s_q * h_q / h_k``. The first three tensors may be strided with a last stride of 1.
        bfloat16 tensors are declared uint16. The windows are those of ``attention.first_key_of_query`` and
        ``attention.end_key_of_query``; with ``has_sink`` the outputs are divided by a sum that a sink has a share in.
        ``lse_scale`` is ln 2 for a natural log-sum-exp, 1 for base 2.

        A cache in a format of bytes is uint8, a token's bytes its last dimension. With ``kv_format="dense_fp8"`` q and
        kcache are e4m3, declared uint8, and ``descale_q (1,), descale_k (1,)`` follow attn_sink: what their elements
        are to be multiplied by.
    """
    dtype, storage, kv_format = spec.dtype, storage_of(spec.dtype), spec.kv_format
    is_fp8 = kv_format == "dense_fp8"
    in_bytes = kv_format in FP8_LAYOUTS
    token_width = FP8_LAYOUTS[kv_format].bytes_per_token if in_bytes else spec.head_dim_qk
    q_storage, k_storage = "uint8" if is_fp8 else storage, "uint8" if is_fp8 or in_bytes else storage
    block_m, page_block_size = spec.block_m, spec.page_block_size
    head_dim_qk, head_dim_v = spec.head_dim_qk, spec.head_dim_v
    rows_of = make_tile_macros(spec)
    read_token = make_token_reader(kv_format, dtype, head_dim_qk)
    b, h_k, rows = T.dynamic("b, h_k, rows")
    num_blocks, max_num_blocks_per_seq, num_sm_parts = T.dynamic("num_blocks, max_num_blocks_per_seq, num_sm_parts")
    len_num_splits, max_num_splits = T.dynamic("len_num_splits, max_num_splits")
    q_stride_b, q_stride_h, q_stride_row = T.dynamic("q_stride_b, q_stride_h, q_stride_row")
    k_stride_page, k_stride_token, k_stride_h = T.dynamic("k_stride_page, k_stride_token, k_stride_h")
    table_stride_b, sink_group = T.dynamic("table_stride_b, sink_group")

    def find_token(kcache, page, offset, head_k):
        """Where the parts of a token are."""

        def at(place):
            return kcache[page, offset, head_k, place]

        return at, scale_in_token(at, kv_format) if in_bytes else None

    @T.macro
    def load_block(kcache, block_table, tile, request, block, head_k, first_key, end_key):
        """Widen the tokens of a block from `first_key` to before `end_key`; the others, wherever they are, become 0."""
        for j in T.serial(BLOCK_N):
            key = block * BLOCK_N + j
            if (key >= first_key) & (key < end_key):
                page = attention.page_index(block_table, request, T.truncdiv(key, page_block_size))
                offset = T.truncmod(key, page_block_size)
                read_token(tile.tokens, j, *find_token(kcache, page, offset, head_k))
            else:
                rows_of.clear_token(tile, j)
        rows_of.transpose_tokens(tile)

    @T.prim_func
    def mla_decode(
        q: T.StridedTensor((b, h_k, rows, head_dim_qk), (q_stride_b, q_stride_h, q_stride_row, 1), q_storage),
        kcache: T.StridedTensor(
            (num_blocks, page_block_size, h_k, token_width), (k_stride_page, k_stride_token, k_stride_h, 1), k_storage
        ),
        block_table: T.StridedTensor((b, max_num_blocks_per_seq), (table_stride_b, 1), "int32"),
        cache_seqlens: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, schedule.NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((len_num_splits,), "int32"),
        out: T.Tensor((b, h_k, rows, head_dim_v), storage),
        softmax_lse: T.Tensor((b, h_k, rows), "float32"),
        out_accum: T.Tensor((max_num_splits, h_k, rows, head_dim_v), "float32"),
        lse_accum_log2: T.Tensor((max_num_splits, h_k, rows), "float32"),
        attn_sink: T.Tensor((h_k, sink_group), "float32"),
        descale_q: T.Tensor((1,), "float32"),
        descale_k: T.Tensor((1,), "float32"),
        softmax_scale_log2: T.float32,
        lse_scale: T.float32,
        seq_len_q: T.int32,
        group_size: T.int32,
        window_left: T.int32,
        window_right: T.int32,
        has_sink: T.int32,
    ):
        results = SimpleNamespace(
            out=out,
            softmax_lse=softmax_lse,
            lse_scale=lse_scale,
            has_sink=has_sink,
            sink_at=lambda request, head_k, row: attn_sink[head_k, T.truncmod(row, group_size)],
            value_scale=descale_k[0] if is_fp8 else None,
        )
        score_scale = softmax_scale_log2
        if is_fp8:
            score_scale = attention.descale_scores(softmax_scale_log2, descale_q[0], descale_k[0])
        with T.Kernel(T.ceildiv(rows, block_m), h_k, num_sm_parts, threads=1) as (tile_index, head_k, part_index):
            tile = rows_of.alloc()
            seen = T.alloc_local((2,), "int32")  # the first key that a row sees, and one past the last
            row0 = tile_index * block_m
            tile_rows = T.min(block_m, rows - row0)
            part = schedule.read_part(tile_scheduler_metadata, part_index)
            for step in T.serial(part.end_place_inclusive - part.begin_place + 1):
                place = part.begin_place + step
                request = T.alloc_var("int32", init=schedule.request_at(tile_scheduler_metadata, place))
                cache_seqlen = cache_seqlens[request]
                first_key = attention.first_visible_key(cache_seqlen, seq_len_q, window_left)
                first_block = T.max(
                    schedule.first_block(part, place),
                    attention.first_visible_block(cache_seqlen, seq_len_q, window_left, BLOCK_N),
                )
                end_block = schedule.end_block(part, place, cache_seqlen, BLOCK_N)
                for i in T.serial(tile_rows):
                    rows_of.clear_row(tile, i)
                    for d in T.serial(head_dim_qk):
                        if is_fp8:
                            tile.query[i, d] = widen_e4m3(q[request, head_k, row0 + i, d])
                        else:
                            tile.query[i, d] = widen(q[request, head_k, row0 + i, d], dtype)
                for visit in T.serial(end_block - first_block):
                    block = first_block + visit
                    load_block(kcache, block_table, tile, request, block, head_k, first_key, cache_seqlen)
                    for i in T.serial(tile_rows):
                        rows_of.score_row(tile, i)
                        if attention.needs_mask(block, BLOCK_N, cache_seqlen, seq_len_q, window_left, window_right):
                            seen[0] = attention.first_key_of_query(
                                T.truncdiv(row0 + i, group_size), cache_seqlen, seq_len_q, window_left
                            )
                            seen[1] = attention.end_key_of_query(
                                T.truncdiv(row0 + i, group_size), cache_seqlen, seq_len_q, window_right
                            )
                            for j in T.serial(BLOCK_N):
                                key = block * BLOCK_N + j
                                tile.scores[i, j] = attention.mask_score(
                                    tile.scores[i, j], (key >= seen[0]) & (key < seen[1])
                                )
                        rows_of.soften_row(tile, i, score_scale)
                        rows_of.accumulate_row(tile, i)
                for i in T.serial(tile_rows):
                    if schedule.is_split(part, place):
                        slot = schedule.split_slot(part, place, request, num_splits)
                        rows_of.write_partial_row(out_accum, lse_accum_log2, (slot, head_k, row0 + i), tile, i)
                    else:
                        rows_of.write_row(
                            results, (request, head_k, row0 + i), tile.acc, i, tile.row_sum[i], tile.row_max[i]
                        )

        with T.Kernel(rows, h_k, b, threads=1) as (merged_row, merged_head_k, merged_request):
            if combine.needs_combine(num_splits, merged_request):
                where = (merged_request, merged_head_k, merged_row)
                rows_of.merge_row(num_splits, out_accum, lse_accum_log2, results, where)

    # Bounds are proven by the schedule and the block table; guards would keep the C compiler from vectorising.
    program = Program(mla_decode, {"tl.disable_safe_memory_legalize": True})
    # Without its scales, where they are not asked for.
    return program if is_fp8 else fix_arguments(program, "mla_decode")

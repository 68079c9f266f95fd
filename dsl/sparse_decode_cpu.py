"""Split-KV MLA decode over the tokens that indices name, and combine, in C."""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl import combine, schedule
from tilemla.dsl.chosen_cpu import make_chosen_macros
from tilemla.dsl.program import Program
from tilemla.dsl.tokens_cpu import storage_of, token_in_page, widen


def make_sparse_decode_program(spec) -> Program:
    """Split-KV decode of chosen tokens, and combine.

    Parameters
    ----------
    spec : KernelSpec
        With ``arch="cpu"`` and ``kernel="mla_sparse_decode"``.

    Returns
    -------
    Program
        ``mla_sparse_decode(q (b, s_q, h_q, head_dim_qk), kcache, indices (b, s_q, topk), topk_length (b,),
        extra_kcache, extra_indices (b, s_q, extra_topk), extra_topk_length (b,),
        tile_scheduler_metadata (num_sm_parts, 8), num_splits (b + 1 or longer,), out (b, s_q, h_q, head_dim_v),
        softmax_lse (b, s_q, h_q), out_accum (max_num_splits, s_q, h_q, head_dim_v),
        lse_accum_log2 (max_num_splits, s_q, h_q), attn_sink (h_q or 1,), softmax_scale_log2, lse_scale,
        page_block_size, extra_page_block_size, has_sink)``. A dense cache is (num_pages, page_block_size, head_dim_qk),
        one of bytes (num_pages, bytes_per_page or less) uint8. q, caches and indices may be strided with a last stride
        of 1; bfloat16 tensors are declared uint16.

        An index is ``page * page_block_size + offset``. It names nothing if it is negative, is past the cache, or comes
        after the first ``topk_length`` of its request, which is held to 0 and topk: no byte is then read for it. The
        blocks of a request are those of 64 indices of the first list, then those of the second; the schedule is that of
        sequences of as many blocks.
    """
    dtype, storage = spec.dtype, storage_of(spec.dtype)
    block_m, head_dim_qk, head_dim_v = spec.block_m, spec.head_dim_qk, spec.head_dim_v
    chosen = make_chosen_macros(spec)
    rows_of = chosen.rows_of
    b, s_q, h_q, sink_heads = T.dynamic("b, s_q, h_q, sink_heads")
    num_pages, page_extent, extra_num_pages, extra_page_extent = T.dynamic(
        "num_pages, page_extent, extra_num_pages, extra_page_extent"
    )
    topk, extra_topk, num_sm_parts = T.dynamic("topk, extra_topk, num_sm_parts")
    len_num_splits, max_num_splits = T.dynamic("len_num_splits, max_num_splits")
    q_stride_b, q_stride_s, q_stride_h = T.dynamic("q_stride_b, q_stride_s, q_stride_h")
    k_stride_page, k_stride_token = T.dynamic("k_stride_page, k_stride_token")
    extra_stride_page, extra_stride_token = T.dynamic("extra_stride_page, extra_stride_token")
    indices_stride_b, indices_stride_s = T.dynamic("indices_stride_b, indices_stride_s")
    extra_indices_stride_b, extra_indices_stride_s = T.dynamic("extra_indices_stride_b, extra_indices_stride_s")
    is_dense = spec.kv_format == "dense"
    if is_dense:
        cache = T.StridedTensor((num_pages, page_extent, head_dim_qk), (k_stride_page, k_stride_token, 1), storage)
        extra_cache = T.StridedTensor(
            (extra_num_pages, extra_page_extent, head_dim_qk), (extra_stride_page, extra_stride_token, 1), storage
        )
    else:
        cache = T.StridedTensor((num_pages, page_extent), (k_stride_page, 1), "uint8")
        extra_cache = T.StridedTensor((extra_num_pages, extra_page_extent), (extra_stride_page, 1), "uint8")

    @T.macro
    def find_token(paged, index):
        """Where the parts of a token are, from its index."""
        page = T.truncdiv(index, paged.page_block_size)
        offset = T.truncmod(index, paged.page_block_size)
        if is_dense:
            found = (lambda d: paged.kcache[page, offset, d]), None
        else:
            found = token_in_page(paged.kcache, page, offset, paged.page_block_size, spec.kv_format)
        return found

    @T.prim_func
    def mla_sparse_decode(
        q: T.StridedTensor((b, s_q, h_q, head_dim_qk), (q_stride_b, q_stride_s, q_stride_h, 1), storage),
        kcache: cache,
        indices: T.StridedTensor((b, s_q, topk), (indices_stride_b, indices_stride_s, 1), "int32"),
        topk_length: T.Tensor((b,), "int32"),
        extra_kcache: extra_cache,
        extra_indices: T.StridedTensor(
            (b, s_q, extra_topk), (extra_indices_stride_b, extra_indices_stride_s, 1), "int32"
        ),
        extra_topk_length: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, schedule.NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((len_num_splits,), "int32"),
        out: T.Tensor((b, s_q, h_q, head_dim_v), storage),
        softmax_lse: T.Tensor((b, s_q, h_q), "float32"),
        out_accum: T.Tensor((max_num_splits, s_q, h_q, head_dim_v), "float32"),
        lse_accum_log2: T.Tensor((max_num_splits, s_q, h_q), "float32"),
        attn_sink: T.Tensor((sink_heads,), "float32"),
        softmax_scale_log2: T.float32,
        lse_scale: T.float32,
        page_block_size: T.int32,
        extra_page_block_size: T.int32,
        has_sink: T.int32,
    ):
        results = SimpleNamespace(
            out=out,
            softmax_lse=softmax_lse,
            lse_scale=lse_scale,
            has_sink=has_sink,
            sink_at=lambda request, query, head: attn_sink[head],
            value_scale=None,
        )
        # As namespaces: an argument of a macro is renamed after its parameter.
        paged = SimpleNamespace(kcache=kcache, page_block_size=page_block_size)
        extra_paged = SimpleNamespace(kcache=extra_kcache, page_block_size=extra_page_block_size)
        with T.Kernel(T.ceildiv(h_q, block_m), s_q, num_sm_parts, threads=1) as (tile_index, query, part_index):
            tile = chosen.alloc()
            row0 = tile_index * block_m
            tile_rows = T.min(block_m, h_q - row0)
            part = schedule.read_part(tile_scheduler_metadata, part_index)
            for step in T.serial(part.end_place_inclusive - part.begin_place + 1):
                request = part.begin_place + step
                length = T.max(T.min(topk_length[request], topk), 0)
                extra_length = T.max(T.min(extra_topk_length[request], extra_topk), 0)
                main_blocks = schedule.count_blocks(length, schedule.BLOCK_N)
                tokens = (main_blocks + schedule.count_blocks(extra_length, schedule.BLOCK_N)) * schedule.BLOCK_N
                first_block = schedule.first_block(part, request)
                end_block = schedule.end_block(part, request, tokens, schedule.BLOCK_N)
                for i in T.serial(tile_rows):
                    rows_of.clear_row(tile, i)
                    for d in T.serial(head_dim_qk):
                        tile.query[i, d] = widen(q[request, query, row0 + i, d], dtype)
                for visit in T.serial(end_block - first_block):
                    block = first_block + visit
                    if block < main_blocks:
                        chosen.load_block(
                            tile,
                            block,
                            length,
                            T.cast(num_pages, "int64") * page_block_size,
                            lambda position: indices[request, query, position],
                            lambda index: find_token(paged, index),
                        )
                    else:
                        chosen.load_block(
                            tile,
                            block - main_blocks,
                            extra_length,
                            T.cast(extra_num_pages, "int64") * extra_page_block_size,
                            lambda position: extra_indices[request, query, position],
                            lambda index: find_token(extra_paged, index),
                        )
                    chosen.attend_block(tile, tile_rows, softmax_scale_log2)
                for i in T.serial(tile_rows):
                    if schedule.is_split(part, request):
                        slot = schedule.split_slot(part, request, request, num_splits)
                        rows_of.write_partial_row(out_accum, lse_accum_log2, (slot, query, row0 + i), tile, i)
                    else:
                        rows_of.write_row(
                            results, (request, query, row0 + i), tile.acc, i, tile.row_sum[i], tile.row_max[i]
                        )

        with T.Kernel(h_q, s_q, b, threads=1) as (merged_head, merged_query, merged_request):
            if combine.needs_combine(num_splits, merged_request):
                where = (merged_request, merged_query, merged_head)
                rows_of.merge_row(num_splits, out_accum, lse_accum_log2, results, where)

    # Bounds are proven by the schedule and the checks of indices; guards would keep the C compiler from vectorising.
    return Program(mla_sparse_decode, {"tl.disable_safe_memory_legalize": True})

"""Dense paged split-KV MLA decode and combine in C: the math of the GPU kernel over local fp32 tiles.

TileLang's ``c`` target runs the grid as nested loops and has neither fragments nor shared memory. A block of 64 tokens
is gathered from its pages, or its part of one, and widened to fp32 once per query tile, keys transposed so that the
score loop runs over contiguous tokens and values as they are, so that the output loop runs over contiguous channels:
the C compiler vectorises both without reordering a sum.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl import attention, combine, schedule
from tilemla.dsl.program import Program

# Terms added to an element of a tile each time that it is in a register.
_UNROLL = 8


def widen(value, dtype) -> Any:
    """A stored element as float32. The c target has no bfloat16: such tensors are declared uint16."""
    if dtype == "bfloat16":
        return T.reinterpret(T.shift_left(T.cast(value, "uint32"), T.uint32(16)), "float32")
    return T.cast(value, "float32")


def narrow(value, dtype) -> Any:
    """A float32 as a stored element, rounded to nearest even; NaN stays NaN."""
    if dtype == "bfloat16":
        bits = T.reinterpret(value, "uint32")
        rounded = bits + T.uint32(0x7FFF) + (T.shift_right(bits, T.uint32(16)) & T.uint32(1))
        is_nan = (bits & T.uint32(0x7FFFFFFF)) > T.uint32(0x7F800000)
        quiet_nan = bits | T.uint32(0x400000)
        return T.cast(T.shift_right(T.if_then_else(is_nan, quiet_nan, rounded), T.uint32(16)), "uint16")
    return T.cast(value, "float16")


def _dot_terms(left, right) -> Any:
    """Sum of products of two short lists of expressions, in order."""
    total = left[0] * right[0]
    for a, b in zip(left[1:], right[1:], strict=True):
        total = total + a * b
    return total


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
    """
    dtype = spec.dtype
    storage = "uint16" if dtype == "bfloat16" else dtype
    block_m, block_n, page_block_size = spec.block_m, schedule.BLOCK_N, spec.page_block_size
    head_dim_qk, head_dim_v = spec.head_dim_qk, spec.head_dim_v
    b, h_k, rows = T.dynamic("b, h_k, rows")
    num_blocks, max_num_blocks_per_seq, num_sm_parts = T.dynamic("num_blocks, max_num_blocks_per_seq, num_sm_parts")
    len_num_splits, max_num_splits = T.dynamic("len_num_splits, max_num_splits")
    q_stride_b, q_stride_h, q_stride_row = T.dynamic("q_stride_b, q_stride_h, q_stride_row")
    k_stride_page, k_stride_token, k_stride_h = T.dynamic("k_stride_page, k_stride_token, k_stride_h")
    table_stride_b, sink_group = T.dynamic("table_stride_b, sink_group")

    @T.macro
    def load_block(kcache, block_table, tokens, keys, request, block, head_k, first_key, end_key):
        """Widen the tokens of a block from `first_key` to before `end_key`; the others, wherever they are, become 0."""
        for j in T.serial(block_n):
            key = block * block_n + j
            if (key >= first_key) & (key < end_key):
                page = attention.page_index(block_table, request, T.truncdiv(key, page_block_size))
                for d in T.serial(head_dim_qk):
                    tokens[j, d] = widen(kcache[page, T.truncmod(key, page_block_size), head_k, d], dtype)
            else:
                for d in T.serial(head_dim_qk):
                    tokens[j, d] = 0.0
        for j in T.serial(block_n // _UNROLL):
            for d in T.serial(head_dim_qk):
                for u in T.serial(_UNROLL):
                    keys[d, j * _UNROLL + u] = tokens[j * _UNROLL + u, d]

    @T.macro
    def score_row(query, keys, scores, i):
        for j in T.serial(block_n):
            scores[i, j] = 0.0
        for d in T.serial(head_dim_qk // _UNROLL):
            for j in T.serial(block_n):
                scores[i, j] = scores[i, j] + _dot_terms(
                    [query[i, d * _UNROLL + u] for u in range(_UNROLL)],
                    [keys[d * _UNROLL + u, j] for u in range(_UNROLL)],
                )

    @T.macro
    def soften_row(scores, acc, row_max, row_sum, moved, i, softmax_scale_log2):
        """Scores to probabilities, with the online softmax's step on maximum, sum and accumulator."""
        moved[0] = -T.infinity("float32")
        for j in T.serial(block_n):
            moved[0] = T.max(moved[0], scores[i, j])
        moved[0] = attention.advance_max(row_max[i], moved[0] * softmax_scale_log2)
        if moved[0] != row_max[i]:
            moved[1] = attention.rescale_factor(row_max[i], moved[0])
            row_max[i] = moved[0]
            row_sum[i] = row_sum[i] * moved[1]
            for d in T.serial(head_dim_v):
                acc[i, d] = acc[i, d] * moved[1]
        for j in T.serial(block_n):
            scores[i, j] = attention.probability(scores[i, j], softmax_scale_log2, row_max[i])
            row_sum[i] = row_sum[i] + scores[i, j]

    @T.macro
    def accumulate_row(scores, tokens, acc, i):
        for j in T.serial(block_n // _UNROLL):
            for d in T.serial(head_dim_v):
                acc[i, d] = acc[i, d] + _dot_terms(
                    [scores[i, j * _UNROLL + u] for u in range(_UNROLL)],
                    [tokens[j * _UNROLL + u, d] for u in range(_UNROLL)],
                )

    @T.macro
    def write_row(acc, i, row_sum, row_max, t, request, head_k, row):
        """Normalise row `i` of a tile and write it, rounded, beside its log-sum-exp."""
        t.softmax_lse[request, head_k, row] = attention.final_lse(row_sum, row_max, t.lse_scale)
        factor = T.alloc_local((1,), "float32")
        factor[0] = attention.inverse_sum(row_sum)
        if t.has_sink != 0:
            sink = t.attn_sink[head_k, T.truncmod(row, t.group_size)]
            factor[0] = attention.inverse_sum(row_sum, attention.sink_share(row_max, sink))
        for d in T.serial(head_dim_v):
            t.out[request, head_k, row, d] = narrow(acc[i, d] * factor[0], dtype)

    @T.macro
    def merge_row(num_splits, out_accum, lse_accum_log2, t, request, head_k, row):
        merged = T.alloc_local((1, head_dim_v), "float32")
        lse_max = T.alloc_local((1,), "float32")
        weight = T.alloc_local((1,), "float32")
        weight_sum = T.alloc_local((1,), "float32")
        slot = num_splits[request]
        count = combine.count_splits(num_splits, request)
        lse_max[0] = combine.start_max()
        weight_sum[0] = 0.0
        for d in T.serial(head_dim_v):
            merged[0, d] = 0.0
        for split in T.serial(count):
            lse_max[0] = combine.advance_max(lse_max[0], lse_accum_log2[slot + split, head_k, row])
        for split in T.serial(count):
            weight[0] = combine.split_weight(lse_accum_log2[slot + split, head_k, row], lse_max[0])
            weight_sum[0] = weight_sum[0] + weight[0]
            for d in T.serial(head_dim_v):
                merged[0, d] = merged[0, d] + weight[0] * out_accum[slot + split, head_k, row, d]
        write_row(merged, 0, weight_sum[0], lse_max[0], t, request, head_k, row)

    @T.prim_func
    def mla_decode(
        q: T.StridedTensor((b, h_k, rows, head_dim_qk), (q_stride_b, q_stride_h, q_stride_row, 1), storage),
        kcache: T.StridedTensor(
            (num_blocks, page_block_size, h_k, head_dim_qk), (k_stride_page, k_stride_token, k_stride_h, 1), storage
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
            attn_sink=attn_sink,
            has_sink=has_sink,
            group_size=group_size,
        )
        with T.Kernel(T.ceildiv(rows, block_m), h_k, num_sm_parts, threads=1) as (tile, head_k, part_index):
            query = T.alloc_local((block_m, head_dim_qk), "float32")
            tokens = T.alloc_local((block_n, head_dim_qk), "float32")
            keys = T.alloc_local((head_dim_qk, block_n), "float32")
            scores = T.alloc_local((block_m, block_n), "float32")
            acc = T.alloc_local((block_m, head_dim_v), "float32")
            row_max = T.alloc_local((block_m,), "float32")
            row_sum = T.alloc_local((block_m,), "float32")
            moved = T.alloc_local((2,), "float32")
            seen = T.alloc_local((2,), "int32")  # the first key that a row sees, and one past the last
            row0 = tile * block_m
            tile_rows = T.min(block_m, rows - row0)
            part = schedule.read_part(tile_scheduler_metadata, part_index)
            for step in T.serial(part.end_request_inclusive - part.begin_request + 1):
                request = part.begin_request + step
                cache_seqlen = cache_seqlens[request]
                first_key = attention.first_visible_key(cache_seqlen, seq_len_q, window_left)
                first_block = T.max(
                    schedule.first_block(part, request),
                    attention.first_visible_block(cache_seqlen, seq_len_q, window_left, block_n),
                )
                end_block = schedule.end_block(part, request, cache_seqlen, block_n)
                for i in T.serial(tile_rows):
                    row_max[i] = attention.RUNNING_MAX_START
                    row_sum[i] = 0.0
                    for d in T.serial(head_dim_v):
                        acc[i, d] = 0.0
                    for d in T.serial(head_dim_qk):
                        query[i, d] = widen(q[request, head_k, row0 + i, d], dtype)
                for visit in T.serial(end_block - first_block):
                    block = first_block + visit
                    load_block(kcache, block_table, tokens, keys, request, block, head_k, first_key, cache_seqlen)
                    for i in T.serial(tile_rows):
                        score_row(query, keys, scores, i)
                        if attention.needs_mask(block, block_n, cache_seqlen, seq_len_q, window_left, window_right):
                            seen[0] = attention.first_key_of_query(
                                T.truncdiv(row0 + i, group_size), cache_seqlen, seq_len_q, window_left
                            )
                            seen[1] = attention.end_key_of_query(
                                T.truncdiv(row0 + i, group_size), cache_seqlen, seq_len_q, window_right
                            )
                            for j in T.serial(block_n):
                                key = block * block_n + j
                                scores[i, j] = attention.mask_score(scores[i, j], (key >= seen[0]) & (key < seen[1]))
                        soften_row(scores, acc, row_max, row_sum, moved, i, softmax_scale_log2)
                        accumulate_row(scores, tokens, acc, i)
                for i in T.serial(tile_rows):
                    if schedule.is_split(part, request):
                        slot = schedule.split_slot(part, request, num_splits)
                        lse_accum_log2[slot, head_k, row0 + i] = attention.partial_lse_log2(row_sum[i], row_max[i])
                        moved[0] = attention.inverse_sum(row_sum[i])
                        for d in T.serial(head_dim_v):
                            out_accum[slot, head_k, row0 + i, d] = acc[i, d] * moved[0]
                    else:
                        write_row(acc, i, row_sum[i], row_max[i], results, request, head_k, row0 + i)

        with T.Kernel(rows, h_k, b, threads=1) as (merged_row, merged_head_k, merged_request):
            if combine.needs_combine(num_splits, merged_request):
                merge_row(
                    num_splits,
                    out_accum,
                    lse_accum_log2,
                    results,
                    merged_request,
                    merged_head_k,
                    merged_row,
                )

    # Bounds are proven by the schedule and the block table; guards would keep the C compiler from vectorising.
    return Program(mla_decode, {"tl.disable_safe_memory_legalize": True})

"""MLA prefill over the tokens that indices name, in C: no schedule, each tile of a query's heads by itself."""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl import attention, schedule
from tilemla.dsl.chosen_cpu import make_chosen_macros
from tilemla.dsl.program import Program
from tilemla.dsl.tokens_cpu import storage_of, widen


def make_sparse_prefill_program(spec) -> Program:
    """Attention of each query to tokens of its own choice.

    Parameters
    ----------
    spec : KernelSpec
        With ``arch="cpu"`` and ``kernel="mla_sparse_prefill"``.

    Returns
    -------
    Program
        ``mla_sparse_prefill(q (s_q, h_q, head_dim_qk), kv (s_kv, head_dim_qk), indices (s_q, topk), topk_length (s_q,),
        out (s_q, h_q, head_dim_v), max_logits (s_q, h_q), softmax_lse (s_q, h_q), attn_sink (h_q or 1,),
        softmax_scale_log2, has_sink)``. The first three tensors may be strided with a last stride of 1; bfloat16
        tensors are declared uint16. An index names nothing if it is negative or not below s_kv, or comes after the
        first ``topk_length`` of its query: no element is then read for it. ``max_logits`` is the largest scaled score,
        -inf where nothing is named; ``softmax_lse`` is natural.
    """
    dtype, storage = spec.dtype, storage_of(spec.dtype)
    block_m, head_dim_qk, head_dim_v = spec.block_m, spec.head_dim_qk, spec.head_dim_v
    chosen = make_chosen_macros(spec)
    rows_of = chosen.rows_of
    s_q, h_q, s_kv, topk, sink_heads = T.dynamic("s_q, h_q, s_kv, topk, sink_heads")
    q_stride_s, q_stride_h, kv_stride, indices_stride = T.dynamic("q_stride_s, q_stride_h, kv_stride, indices_stride")

    @T.prim_func
    def mla_sparse_prefill(
        q: T.StridedTensor((s_q, h_q, head_dim_qk), (q_stride_s, q_stride_h, 1), storage),
        kv: T.StridedTensor((s_kv, head_dim_qk), (kv_stride, 1), storage),
        indices: T.StridedTensor((s_q, topk), (indices_stride, 1), "int32"),
        topk_length: T.Tensor((s_q,), "int32"),
        out: T.Tensor((s_q, h_q, head_dim_v), storage),
        max_logits: T.Tensor((s_q, h_q), "float32"),
        softmax_lse: T.Tensor((s_q, h_q), "float32"),
        attn_sink: T.Tensor((sink_heads,), "float32"),
        softmax_scale_log2: T.float32,
        has_sink: T.int32,
    ):
        results = SimpleNamespace(
            out=out,
            softmax_lse=softmax_lse,
            lse_scale=attention.LN_2,
            has_sink=has_sink,
            sink_at=lambda query, head: attn_sink[head],
            value_scale=None,
        )
        with T.Kernel(T.ceildiv(h_q, block_m), s_q, threads=1) as (tile_index, query):
            tile = chosen.alloc()
            row0 = tile_index * block_m
            tile_rows = T.min(block_m, h_q - row0)
            length = T.max(T.min(topk_length[query], topk), 0)
            for i in T.serial(tile_rows):
                rows_of.clear_row(tile, i)
                tile.top_score[i] = -T.infinity("float32")
                for d in T.serial(head_dim_qk):
                    tile.query[i, d] = widen(q[query, row0 + i, d], dtype)
            for block in T.serial(schedule.count_blocks(length, schedule.BLOCK_N)):
                chosen.load_block(
                    tile,
                    block,
                    length,
                    s_kv,
                    lambda position: indices[query, position],
                    lambda index: ((lambda d: kv[index, d]), None),
                )
                chosen.attend_block(tile, tile_rows, softmax_scale_log2, keep_top_score=True)
            for i in T.serial(tile_rows):
                rows_of.write_row(results, (query, row0 + i), tile.acc, i, tile.row_sum[i], tile.row_max[i])
                max_logits[query, row0 + i] = tile.top_score[i] * (softmax_scale_log2 * attention.LN_2)

    # Bounds are proven by the checks of indices; guards would keep the C compiler from vectorising.
    return Program(mla_sparse_prefill, {"tl.disable_safe_memory_legalize": True})

"""Dense paged split-KV MLA decode for CUDA architectures without wgmma: mma.sync and cp.async.

A CTA walks the requests of one part of the schedule for one tile of query rows and one KV head. Tokens come in tiles of
`Tile.block_n`, whatever the page size: each row of a tile is found in the block table on its own. Every warp holds all
rows of the output tile and a slice of its columns, and of the scores all rows and a slice of the tokens.
"""

import dataclasses
from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl.attention import (
    RUNNING_MAX_START,
    advance_max,
    end_key_of_query,
    final_lse,
    first_key_of_query,
    first_visible_key,
    inverse_sum,
    mask_score,
    needs_mask,
    page_index,
    partial_lse_log2,
    probability,
    rescale_factor,
    sink_share,
)
from tilemla.dsl.program import Program
from tilemla.dsl.schedule import (
    BLOCK_N,
    NUM_COLUMNS,
    end_block,
    first_block,
    is_split,
    read_part,
    request_at,
    split_slot,
)
from tilemla.dsl.sm90.combine import make_combine

_CHUNK = 8  # elements of a 16-byte cp.async
_LANES_PER_ROW = 8  # threads that load a row: 128 bytes at a time
_LINE = _CHUNK * _LANES_PER_ROW
_PAD = 8  # fp32 columns that keep rows of scores out of each other's banks


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a CTA is cut; ``block_m``, its query rows, is the spec's.

    Parameters
    ----------
    block_n : int
        Tokens of a tile, a divisor of the scheduling block.
    num_stages : int
        Token tiles in shared memory; all but one are under way while one is worked on.
    threads : int
        A multiple of 32. Each warp takes ``block_n`` and ``head_dim_v`` over the number of warps, 8 or more.
    """

    block_n: int
    num_stages: int
    threads: int


# Shared memory holds block_m + num_stages * block_n rows of 576 elements and the probabilities.
TILES = {
    "sm_80": Tile(block_n=32, num_stages=3, threads=128),
    "sm_89": Tile(block_n=32, num_stages=1, threads=128),
    "sm_100": Tile(block_n=32, num_stages=3, threads=128),
    "sm_120": Tile(block_n=32, num_stages=1, threads=128),
}

PASS_CONFIG = {
    # Where T.gemm could choose wgmma it would be for a target that this text is not written for.
    "tl.disable_wgmma": True,
    "tl.disable_warp_specialized": True,
    # Every index is in bounds by construction: rows and tokens past the end are clamped, stores are guarded.
    "tl.disable_safe_memory_legalize": True,
    "tl.enable_fast_math": True,
}


def make_decode_program(spec, config, tile: Tile | None = None) -> Program:
    """Make the split-KV decode and combine kernels of a spec.

    Parameters
    ----------
    spec : KernelSpec
        Of an architecture in ``TILES``.
    config : KernelConfig
        What the combine kernel is tuned by.
    tile : Tile, optional
        Instead of the architecture's own.

    Returns
    -------
    Program
        ``mla_decode``, of the parameters that ``tilemla.dsl.make_programs`` lists.
    """
    dtype, accum = spec.dtype, "float32"
    tile = tile or TILES[spec.arch]
    block_m, block_n, num_stages, threads = spec.block_m, tile.block_n, tile.num_stages, tile.threads
    page_block_size, head_dim_v, head_dim_qk = spec.page_block_size, spec.head_dim_v, spec.head_dim_qk
    tiles_per_block = BLOCK_N // block_n
    rows_per_pass = threads // _LANES_PER_ROW
    ahead = num_stages - 1  # tiles under way while one is worked on
    b, h_k, rows, num_blocks, max_num_blocks_per_seq = T.dynamic("b, h_k, rows, num_blocks, max_num_blocks_per_seq")
    num_sm_parts, len_num_splits, max_num_splits = T.dynamic("num_sm_parts, len_num_splits, max_num_splits")
    q_stride_b, q_stride_h, q_stride_row = T.dynamic("q_stride_b, q_stride_h, q_stride_row")
    k_stride_page, k_stride_token, k_stride_h = T.dynamic("k_stride_page, k_stride_token, k_stride_h")
    table_stride_b, sink_group = T.dynamic("table_stride_b, sink_group")
    # With the registers of five CTAs ptxas spills for sm_120.
    combine = make_combine(head_dim_v, accum, config, early=False, ctas_per_sm=4)
    sizes = SimpleNamespace(batch_size=b, num_heads_k=h_k, rows=rows)

    @T.macro
    def load_queries(query, q, request, head, row0, tx):
        # Rows past the last one are the last one over again: nobody stores what comes of them.
        for step in T.unroll(block_m // rows_per_pass):
            i = step * rows_per_pass + tx // _LANES_PER_ROW
            row = T.min(row0 + i, rows - 1)
            for line in T.unroll(head_dim_qk // _LINE):
                column = line * _LINE + tx % _LANES_PER_ROW * _CHUNK
                T.ptx_cp_async(
                    T.access_ptr(query[i, column], "w", _CHUNK),
                    T.access_ptr(q[request, head, row, column], "r", _CHUNK),
                    _CHUNK,
                )

    @T.macro
    def load_tokens(kv, stage, kcache, block_table, request, head, first, visible, tx):
        # Tokens that no query sees are the nearest one that is seen over again. Their probability is 0, and unlike what
        # may lie where they are, 0 times that is 0.
        for step in T.unroll(block_n // rows_per_pass):
            j = step * rows_per_pass + tx // _LANES_PER_ROW
            token = T.max(T.min(first + j, visible.end - 1), visible.begin)
            page = page_index(block_table, request, token // page_block_size)
            for line in T.unroll(head_dim_qk // _LINE):
                column = line * _LINE + tx % _LANES_PER_ROW * _CHUNK
                T.ptx_cp_async(
                    T.access_ptr(kv[stage, j, column], "w", _CHUNK),
                    T.access_ptr(kcache[page, token % page_block_size, head, column], "r", _CHUNK),
                    _CHUNK,
                )

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
        with T.Kernel(T.ceildiv(rows, block_m), h_k, num_sm_parts, threads=threads) as (tile_index, head, part_index):
            query = T.alloc_shared((block_m, head_dim_qk), dtype)
            kv = T.alloc_shared((num_stages, block_n, head_dim_qk), dtype)
            scores = T.alloc_shared((block_m, block_n + _PAD), accum)
            weights = T.alloc_shared((block_m, block_n), dtype)
            scale = T.alloc_shared((block_m,), accum)
            product = T.alloc_fragment((block_m, block_n), accum)
            acc = T.alloc_fragment((block_m, head_dim_v), accum)
            # The softmax has threads of one warp beside each other in a row, whichever warps multiplied it.
            tile = T.alloc_fragment((block_m, block_n), accum)
            sums = T.alloc_fragment((block_m, block_n), accum)  # over each thread's columns until the request ends
            running_max = T.alloc_fragment((block_m,), accum)
            tile_max = T.alloc_fragment((block_m,), accum)
            first_key = T.alloc_fragment((block_m,), "int32")  # that a row sees
            end_key = T.alloc_fragment((block_m,), "int32")
            row_sum = T.alloc_fragment((block_m,), accum)
            factor = T.alloc_fragment((block_m,), accum)
            tx = T.get_thread_binding()
            row0 = tile_index * block_m
            part = read_part(tile_scheduler_metadata, part_index)
            for place in T.serial(part.begin_place, part.end_place_inclusive + 1):
                request = T.alloc_var("int32", init=request_at(tile_scheduler_metadata, place))
                cache_seqlen = T.alloc_var("int32", init=cache_seqlens[request])
                first_seen = T.alloc_var("int32", init=first_visible_key(cache_seqlen, seq_len_q, window_left))
                visible = SimpleNamespace(begin=first_seen, end=cache_seqlen)
                begin = T.alloc_var(
                    "int32",
                    init=T.max(first_block(part, place) * tiles_per_block, T.truncdiv(first_seen, block_n)),
                )
                end = T.alloc_var(
                    "int32",
                    init=T.min(
                        end_block(part, place, cache_seqlen, BLOCK_N) * tiles_per_block,
                        T.ceildiv(cache_seqlen, block_n),
                    ),
                )
                T.sync_threads()  # the request before has been read
                load_queries(query, q, request, head, row0, tx)
                for k in T.unroll(ahead):
                    if begin + k < end:
                        load_tokens(
                            kv,
                            k,
                            kcache,
                            block_table,
                            request,
                            head,
                            (begin + k) * block_n,
                            visible,
                            tx,
                        )
                    T.ptx_commit_group()
                T.fill(acc, 0)
                T.fill(sums, 0)
                T.fill(running_max, RUNNING_MAX_START)
                for i in T.Parallel(block_m):
                    query_index = T.truncdiv(row0 + i, group_size)
                    first_key[i] = first_key_of_query(query_index, cache_seqlen, seq_len_q, window_left)
                    end_key[i] = end_key_of_query(query_index, cache_seqlen, seq_len_q, window_right)
                for step in T.serial(end - begin):
                    if ahead > 0:
                        T.ptx_wait_group(ahead - 1)
                    # What was loaded is there for all, and the stage that is loaded next has been read by all.
                    T.sync_threads()
                    if begin + step + ahead < end:
                        load_tokens(
                            kv,
                            (step + ahead) % num_stages,
                            kcache,
                            block_table,
                            request,
                            head,
                            (begin + step + ahead) * block_n,
                            visible,
                            tx,
                        )
                    T.ptx_commit_group()
                    if ahead == 0:
                        T.ptx_wait_group(0)
                        T.sync_threads()
                    T.gemm(query, kv[step % num_stages, :, :], product, transpose_B=True, clear_accum=True)
                    T.copy(product, scores[:, 0:block_n])
                    T.copy(scores[:, 0:block_n], tile)
                    if needs_mask(begin + step, block_n, cache_seqlen, seq_len_q, window_left, window_right):
                        for i, j in T.Parallel(block_m, block_n):
                            key = (begin + step) * block_n + j
                            tile[i, j] = mask_score(tile[i, j], (key >= first_key[i]) & (key < end_key[i]))
                    T.reduce_max(tile, tile_max, dim=1, clear=True)
                    for i in T.Parallel(block_m):
                        tile_max[i] = advance_max(running_max[i], tile_max[i] * softmax_scale_log2)
                        scale[i] = rescale_factor(running_max[i], tile_max[i])
                    for i, j in T.Parallel(block_m, block_n):
                        tile[i, j] = probability(tile[i, j], softmax_scale_log2, tile_max[i])
                        sums[i, j] = sums[i, j] * rescale_factor(running_max[i], tile_max[i]) + tile[i, j]
                    T.copy(tile_max, running_max)
                    T.copy(tile, weights)
                    for i, j in T.Parallel(block_m, head_dim_v):
                        acc[i, j] = acc[i, j] * scale[i]
                    T.gemm(weights, kv[step % num_stages, :, 0:head_dim_v], acc, policy=T.GemmWarpPolicy.FullCol)
                T.ptx_wait_group(0)
                T.reduce_sum(sums, row_sum, dim=1, clear=True)
                for i in T.Parallel(block_m):
                    factor[i] = inverse_sum(row_sum[i])
                    if has_sink != 0:
                        if T.Not(is_split(part, place)):
                            sink = attn_sink[head, T.truncmod(row0 + i, group_size)]
                            factor[i] = inverse_sum(row_sum[i], sink_share(running_max[i], sink))
                T.copy(factor, scale)
                for i, j in T.Parallel(block_m, head_dim_v):
                    acc[i, j] = acc[i, j] * scale[i]
                if is_split(part, place):
                    slot = T.alloc_var("int32", init=split_slot(part, place, request, num_splits))
                    for i, j in T.Parallel(block_m, head_dim_v):
                        if row0 + i < rows:
                            out_accum[slot, head, row0 + i, j] = acc[i, j]
                    for i in T.Parallel(block_m):
                        if row0 + i < rows:
                            lse_accum_log2[slot, head, row0 + i] = partial_lse_log2(row_sum[i], running_max[i])
                else:
                    for i, j in T.Parallel(block_m, head_dim_v):
                        if row0 + i < rows:
                            out[request, head, row0 + i, j] = acc[i, j]
                    for i in T.Parallel(block_m):
                        if row0 + i < rows:
                            softmax_lse[request, head, row0 + i] = final_lse(row_sum[i], running_max[i], lse_scale)

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

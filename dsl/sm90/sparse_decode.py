"""Sparse split-KV MLA decode for sm_90a: tokens gathered by index, wgmma, a persistent walk of the schedule.

A CTA walks the requests of one part of the schedule for one query of each and one tile of 64 heads. A producer
warpgroup gathers the 64 tokens of a block from anywhere in the cache (`gather`), and two warpgroups take turns at their
scores (`alternate`). Where the cache is FP8, tokens are converted on their way: by a pair of CTAs that share those of a
block, each half of them (`gather_fp8_pair`), or alone (`gather_fp8`), for a score warpgroup and two output warpgroups
that work as those of the dense kernel do (`sparse_score`, `sparse_output`): what is converted alone comes too late for
warpgroups that take turns. The combine kernel is launched under the tail of this one.
"""

import functools
import operator
from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.program import Program
from tilemla.dsl.schedule import BLOCK_N, NUM_COLUMNS, read_part
from tilemla.dsl.sm90 import gather_fp8, gather_fp8_pair
from tilemla.dsl.sm90.alternate import SUMS, make_alternating_warpgroup
from tilemla.dsl.sm90.combine import make_combine
from tilemla.dsl.sm90.decode import PASS_CONFIG
from tilemla.dsl.sm90.gather import (
    BLOCK,
    EXTRA_LENGTH,
    LENGTH,
    MAIN,
    make_turn_producer,
    make_walk,
    request_of_cursor,
)
from tilemla.dsl.sm90.gather_source import GATHER_SOURCE
from tilemla.dsl.sm90.roles import make_roles, make_turns
from tilemla.dsl.sm90.softmax import is_in_one_part, make_softmax
from tilemla.dsl.sm90.sparse_output import make_output_warpgroup
from tilemla.dsl.sm90.sparse_score import make_score_warpgroup
from tilemla.dsl.sm90.sparse_tile import (
    ALONE,
    EMPTY_ARRIVALS,
    FULL_ARRIVALS,
    NUM_STAGES,
    NUM_THREADS,
    NUM_TURN_THREADS,
    NUM_WARPS,
    PAIR,
    PAIRED_TURN_REGISTERS,
    QUARTER,
    TURN_REGISTERS,
    arrivals_of_turns,
    blocks_of_place,
)
from tilemla.dsl.sm90.tile import HALF, ROWS, STAGE_COLUMNS
from tilemla.dsl.sm90.way_out import INTERLEAVED, make_way_out, make_write_tile
from tilemla.dsl.sm90.way_out_source import WAY_OUT_SOURCE
from tilemla.kv_formats import FP8_LAYOUTS


def _head_sink(head, row, t):
    """The attention sink of a row: rows are heads."""
    return t.attn_sink[row]


def make_sparse_decode_program(spec, config, *, paired: bool = False) -> Program:
    """Make the sparse split-KV decode and combine kernels of a spec.

    Parameters
    ----------
    spec : KernelSpec
        Of architecture ``"sm_90a"`` and kernel ``"mla_sparse_decode"``.
    config : KernelConfig
        What the combine kernel is tuned by.
    paired : bool
        Whether the thread blocks of two neighbouring tiles form a cluster and convert the tokens of a block together:
        for caches of bytes, and heads that make an even number of tiles.

    Returns
    -------
    Program
        ``mla_sparse_decode``. Byte caches begin, and their pages are apart, by multiples of 16 bytes, and so are the
        tokens of the others.
    """
    dtype, accum = spec.dtype, "float32"
    head_dim_v, head_dim_qk = spec.head_dim_v, spec.head_dim_qk
    layout = FP8_LAYOUTS.get(spec.kv_format)
    takes_turns = paired or layout is None
    blocks, alloc_empty, open_grid = ALONE, T.alloc_barrier, T.Kernel
    if paired:
        blocks, alloc_empty = PAIR, T.alloc_cluster_barrier
        open_grid = functools.partial(T.ClusterKernel, cluster_dims=PAIR)
    num_threads, full_arrivals, empty_arrivals = NUM_THREADS, FULL_ARRIVALS, EMPTY_ARRIVALS
    if takes_turns:
        num_threads, (full_arrivals, empty_arrivals) = NUM_TURN_THREADS, arrivals_of_turns(blocks)
    gathering = gather_fp8_pair if paired else gather_fp8
    num_words = NUM_WARPS * blocks
    b, s_q, h_q, topk, extra_topk = T.dynamic("b, s_q, h_q, topk, extra_topk")
    num_pages, extra_num_pages, num_sm_parts = T.dynamic("num_pages, extra_num_pages, num_sm_parts")
    len_num_splits, max_num_splits, len_sink = T.dynamic("len_num_splits, max_num_splits, len_sink")
    q_stride_b, q_stride_s, q_stride_h = T.dynamic("q_stride_b, q_stride_s, q_stride_h")
    k_stride_page, k_stride_token = T.dynamic("k_stride_page, k_stride_token")
    extra_stride_page, extra_stride_token = T.dynamic("extra_stride_page, extra_stride_token")
    indices_stride_b, indices_stride_s = T.dynamic("indices_stride_b, indices_stride_s")
    extra_indices_stride_b, extra_indices_stride_s = T.dynamic("extra_indices_stride_b, extra_indices_stride_s")
    if layout is None:
        page, extra_page = T.dynamic("page, extra_page")
        cache = T.StridedTensor((num_pages, page, head_dim_qk), (k_stride_page, k_stride_token, 1), dtype)
        extra_cache = T.StridedTensor(
            (extra_num_pages, extra_page, head_dim_qk), (extra_stride_page, extra_stride_token, 1), dtype
        )
    else:
        page_bytes, extra_page_bytes = T.dynamic("page_bytes, extra_page_bytes")
        cache = T.StridedTensor((num_pages, page_bytes), (k_stride_page, 1), "uint8")
        extra_cache = T.StridedTensor((extra_num_pages, extra_page_bytes), (extra_stride_page, 1), "uint8")

    def read_sink(row, t):
        return t.attn_sink[T.min(t.tile[0] + row, t.rows - 1)]

    softmax = make_softmax(
        head_dim_v,
        alpha_slot=lambda _block, stage: stage,
        inverse_sum_index=lambda stage, row: stage * ROWS + row,
        read_sink=read_sink,
    )

    @T.macro
    def write_sums(place, request, row, half, row_sum, running_max, t):
        softmax.write_lse(place, request, row, row_sum[half], running_max[half], t)

    def out_tile(request, column, t):
        return t.out[request, t.tile[1], t.tile[0] : t.tile[0] + ROWS, column : column + HALF]

    combine = make_combine(head_dim_v, accum, config, early=True, interleaved=INTERLEAVED, read_sink=_head_sink)

    @T.macro
    def read_index(index, cursor, token, t):
        if cursor[BLOCK] < cursor[MAIN]:
            position = T.alloc_var("int32", init=cursor[BLOCK] * BLOCK_N + token)
            if position < cursor[LENGTH]:
                index[0] = t.indices[request_of_cursor(cursor, t), t.head, position]
        else:
            extra_position = T.alloc_var("int32", init=(cursor[BLOCK] - cursor[MAIN]) * BLOCK_N + token)
            index[1] = 1
            if extra_position < cursor[EXTRA_LENGTH]:
                index[0] = t.extra_indices[request_of_cursor(cursor, t), t.head, extra_position]

    @T.macro
    def prefetch(token, t):
        position = T.alloc_var("int32", init=t.part.begin_block * BLOCK_N + token)
        if (t.part.begin_place <= t.part.end_place_inclusive) & (position < t.topk):
            T.call_extern(
                "handle",
                "tilemla::prefetch",
                T.address_of(t.indices[t.part.begin_place, t.head, position]),
            )

    def make_find(prefix: str, slot: int) -> Any:
        """Find a token of ``t.kcache`` or ``t.extra_kcache``, which a macro's argument would rename."""
        cache_of = operator.attrgetter(f"{prefix}kcache")
        pages_of = operator.attrgetter(f"{prefix}num_pages")
        size_of = operator.attrgetter(f"{prefix}page_block_size")

        @T.macro
        def find(place, index, t):
            page = T.alloc_var(
                "int32",
                init=T.call_extern("int32", "tilemla::divide", index[0], t.reciprocals[slot], t.reciprocals[slot + 1]),
            )
            token = T.alloc_var("int32", init=index[0] - page * size_of(t))
            if layout is None:
                place[0] = T.call_extern("int64", "tilemla::address_of", T.address_of(cache_of(t)[page, token, 0]))
            else:
                first = T.call_extern("int64", "tilemla::address_of", T.address_of(cache_of(t)[page, 0]))
                place[0] = first + T.cast(token * layout.bytes_apart, "int64")
                if layout.scales_apart:
                    first_scale = size_of(t) * layout.bytes_apart
                    place[1] = first + T.cast(first_scale + token * layout.scale_bytes, "int64")
            # Nothing was read at an address that is none.
            if (index[0] < 0) | (page >= pages_of(t)):
                place[0] = 0
                if layout is not None:
                    place[1] = 0

        return find

    find, find_extra = make_find("", 0), make_find("extra_", 2)

    @T.macro
    def address(place, index, t):
        if index[1] == 0:
            find(place, index, t)
        else:
            find_extra(place, index, t)

    walk = make_walk(blocks_of_place, read_index, address, blocks, prefetch)
    if takes_turns:
        warpgroup = make_alternating_warpgroup(
            dtype,
            head_dim_qk,
            head_dim_v,
            blocks_of_place,
            SimpleNamespace(
                write_tile=make_write_tile(out_tile, splits=True), write_empty=make_way_out(HALF).write_empty
            ),
            read_sink=read_sink,
            write_sums=write_sums,
            sink_counts=is_in_one_part,
            launches=True,
            blocks=blocks,
        )
        if paired:
            play = make_turns(warpgroup, gather_fp8_pair.make_paired_producer(layout, walk), PAIRED_TURN_REGISTERS)
        else:
            play = make_turns(warpgroup, make_turn_producer(head_dim_qk, walk, blocks_of_place), TURN_REGISTERS)
    else:
        play = make_roles(
            make_score_warpgroup(dtype, head_dim_qk, softmax, blocks_of_place, write_sums),
            make_output_warpgroup(head_dim_v, make_way_out(QUARTER), blocks_of_place),
            gather_fp8.make_fp8_producer(layout, walk),
        )

    def q_tile(request, t):
        return t.q[request, t.head, t.tile[0] : t.tile[0] + ROWS, 0:head_dim_qk]

    @T.prim_func
    def mla_sparse_decode(
        q: T.StridedTensor((b, s_q, h_q, head_dim_qk), (q_stride_b, q_stride_s, q_stride_h, 1), dtype),
        kcache: cache,
        indices: T.StridedTensor((b, s_q, topk), (indices_stride_b, indices_stride_s, 1), "int32"),
        topk_length: T.Tensor((b,), "int32"),
        extra_kcache: extra_cache,
        extra_indices: T.StridedTensor(
            (b, s_q, extra_topk), (extra_indices_stride_b, extra_indices_stride_s, 1), "int32"
        ),
        extra_topk_length: T.Tensor((b,), "int32"),
        tile_scheduler_metadata: T.Tensor((num_sm_parts, NUM_COLUMNS), "int32"),
        num_splits: T.Tensor((len_num_splits,), "int32"),
        out: T.Tensor((b, s_q, h_q, head_dim_v), dtype),
        softmax_lse: T.Tensor((b, s_q, h_q), accum),
        out_accum: T.Tensor((max_num_splits, s_q, h_q, head_dim_v), accum),
        lse_accum_log2: T.Tensor((max_num_splits, s_q, h_q), accum),
        attn_sink: T.Tensor((len_sink,), accum),
        softmax_scale_log2: T.float32,
        lse_scale: T.float32,
        page_block_size: T.int32,
        extra_page_block_size: T.int32,
        has_sink: T.int32,
    ):
        # Tiles of a part lie side by side: those of a query read the same tokens.
        with open_grid(
            T.ceildiv(h_q, ROWS) * num_sm_parts, s_q, threads=num_threads, prelude=GATHER_SOURCE + WAY_OUT_SOURCE
        ) as (
            part_and_tile,
            query,
        ):
            kv = T.alloc_shared((NUM_STAGES + 1, BLOCK_N, STAGE_COLUMNS), dtype)
            maxima, sums, met, alpha, inverse_sums, raw, raw_scales = (None,) * 7
            # What the warpgroups that take turns tell one another, or the score warpgroup the others.
            if takes_turns:
                maxima = T.alloc_shared((NUM_STAGES, ROWS), accum, scope="shared")  # running, after a block
                sums = T.alloc_shared((SUMS,), accum, scope="shared")
                met = T.alloc_barrier([2 * NUM_WARPS])  # the warps of both have written a tile's sums
            else:
                alpha = T.alloc_shared((NUM_STAGES, ROWS), accum, scope="shared")
                inverse_sums = T.alloc_shared((NUM_STAGES * ROWS,), accum, scope="shared")
            if layout is not None:  # bytes that are converted next
                raw = T.alloc_shared(gathering.RAW_SHAPE, "uint32", scope="shared")
                raw_scales = T.alloc_shared(gathering.RAW_SCALES_SHAPE, "uint32", scope="shared")
            valid = T.alloc_shared((NUM_STAGES, num_words), "int32", scope="shared")
            tile = T.alloc_shared((3,), "int32", scope="shared")  # its first row, query and part
            reciprocals = T.alloc_shared((4,), "uint32", scope="shared")  # of the page sizes, for divisions
            full = T.alloc_barrier(full_arrivals)  # a piece of a block is there
            empty = alloc_empty(empty_arrivals)  # the warps that multiply with a piece of V, or with P, are done
            p_full = T.alloc_barrier([NUM_WARPS] * NUM_STAGES)  # the warps that make P are done
            q_full = T.alloc_barrier([1])

            tx = T.get_thread_binding()
            head_tiles = T.alloc_var("int32", init=T.ceildiv(h_q, ROWS))
            line = T.alloc_var("int32", init=T.truncdiv(part_and_tile, head_tiles))
            part = read_part(tile_scheduler_metadata, line)
            begin_place = part.begin_place
            end_place_inclusive = part.end_place_inclusive
            begin_block = part.begin_block
            last_end_block = part.end_block
            if tx == 0:
                tile[0] = (part_and_tile - line * head_tiles) * ROWS
                tile[1] = query
                tile[2] = line
                T.call_extern("handle", "tilemla::invert", T.address_of(reciprocals[0]), page_block_size)
                T.call_extern("handle", "tilemla::invert", T.address_of(reciprocals[2]), extra_page_block_size)
            T.sync_threads()
            t = SimpleNamespace(
                q=q,
                q_tile=q_tile,
                kcache=kcache,
                extra_kcache=extra_kcache,
                num_pages=num_pages,
                extra_num_pages=extra_num_pages,
                page_block_size=page_block_size,
                extra_page_block_size=extra_page_block_size,
                indices=indices,
                topk_length=topk_length,
                topk=topk,
                extra_indices=extra_indices,
                extra_topk_length=extra_topk_length,
                extra_topk=extra_topk,
                order=None,
                num_splits=num_splits,
                out=out,
                softmax_lse=softmax_lse,
                out_accum=out_accum,
                lse_accum_log2=lse_accum_log2,
                softmax_scale_log2=softmax_scale_log2,
                lse_scale=lse_scale,
                attn_sink=attn_sink,
                has_sink=has_sink,
                kv=kv,
                alpha=alpha,
                inverse_sum=inverse_sums,
                maxima=maxima,
                sums=sums,
                met=met,
                raw=raw,
                raw_scales=raw_scales,
                valid=valid,
                tile=tile,
                reciprocals=reciprocals,
                full=full,
                empty=empty,
                p_full=p_full,
                q_full=q_full,
                tx=tx,
                rows=h_q,
                head=tile[1],
                part=read_part(tile_scheduler_metadata, tile[2])._replace(
                    begin_place=begin_place,
                    end_place_inclusive=end_place_inclusive,
                    begin_block=begin_block,
                    end_block=last_end_block,
                ),
            )
            play(t)
            if paired:
                T.cluster_sync()  # and are until nobody stores or arrives there any more

        merging = SimpleNamespace(
            out_accum=out_accum,
            lse_accum_log2=lse_accum_log2,
            num_splits=num_splits,
            out=out,
            softmax_lse=softmax_lse,
            attn_sink=attn_sink,
            has_sink=has_sink,
            lse_scale=lse_scale,
        )
        combine(merging, SimpleNamespace(batch_size=b, num_heads_k=s_q, rows=h_q))

    return Program(mla_sparse_decode, PASS_CONFIG)

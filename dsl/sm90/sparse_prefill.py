"""Sparse MLA prefill for sm_90a: every query attends to tokens of its own, gathered by index.

Three warpgroups: two that take turns at the scores, of which each has half of the output columns (`alternate`), and one
that gathers the tokens (`gather`); a request is a query here. A CTA takes a run of queries for one tile of 64 heads:
the next query's tokens are on their way while a tile is written.
"""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl.attention import LN_2, final_lse
from tilemla.dsl.program import Program
from tilemla.dsl.schedule import BLOCK_N, count_blocks
from tilemla.dsl.sm90.alternate import SUMS, make_alternating_warpgroup
from tilemla.dsl.sm90.decode import PASS_CONFIG
from tilemla.dsl.sm90.gather import BLOCK, LENGTH, make_turn_producer, make_walk, request_of_cursor
from tilemla.dsl.sm90.gather_source import GATHER_SOURCE
from tilemla.dsl.sm90.roles import make_turns
from tilemla.dsl.sm90.sparse_tile import (
    ALONE,
    NUM_STAGES,
    NUM_TURN_THREADS,
    NUM_WARPS,
    TURN_REGISTERS,
    arrivals_of_turns,
)
from tilemla.dsl.sm90.tile import HALF, NOT_UNROLLED, ROWS, STAGE_COLUMNS
from tilemla.dsl.sm90.way_out import make_write_tile

# Queries of a CTA. With fewer CTAs than that many for each of the SMs of an H100 the last ones would be waited for.
LONGEST_RUN = 4
CTAS_PER_RUN = 16 * 132


def make_sparse_prefill_program(spec) -> Program:
    """Make the sparse prefill kernel of a spec.

    Parameters
    ----------
    spec : KernelSpec
        Of architecture ``"sm_90a"`` and kernel ``"mla_sparse_prefill"``.

    Returns
    -------
    Program
        ``mla_sparse_prefill``. Tokens are apart by multiples of 16 bytes.
    """
    dtype, accum = spec.dtype, "float32"
    full_arrivals, empty_arrivals = arrivals_of_turns(ALONE)
    head_dim_v, head_dim_qk = spec.head_dim_v, spec.head_dim_qk
    s_q, h_q, s_kv, topk, len_sink = T.dynamic("s_q, h_q, s_kv, topk, len_sink")
    q_stride_s, q_stride_h, kv_stride, indices_stride = T.dynamic("q_stride_s, q_stride_h, kv_stride, indices_stride")

    def blocks_of(_place, query, t):
        length = T.min(t.topk_length[query], t.topk)
        blocks = count_blocks(length, BLOCK_N)
        return SimpleNamespace(begin=0, end=blocks, main=blocks, length=length, extra_length=0)

    def q_tile(query, t):
        return t.q[query, t.tile[0] : t.tile[0] + ROWS, 0:head_dim_qk]

    def out_tile(query, column, t):
        return t.out[query, t.tile[0] : t.tile[0] + ROWS, column : column + HALF]

    @T.macro
    def read_index(index, cursor, token, t):
        position = T.alloc_var("int32", init=cursor[BLOCK] * BLOCK_N + token)
        if position < cursor[LENGTH]:
            index[0] = t.indices[request_of_cursor(cursor, t), position]

    @T.macro
    def address(place, index, t):
        place[0] = 0
        if (index[0] >= 0) & (index[0] < t.s_kv):
            place[0] = T.call_extern("int64", "tilemla::address_of", T.address_of(t.latent[index[0], 0]))

    @T.macro
    def write_sums(_place, query, row, half, row_sum, running_max, t):
        t.softmax_lse[query, row] = final_lse(row_sum[half], running_max[half], LN_2)
        t.max_logits[query, row] = t.true_max[half] * LN_2

    @T.macro
    def write_empty(_place, query, column, t):
        row0 = T.alloc_var("int32", init=t.tile[0])
        end_row = T.alloc_var("int32", init=T.min(row0 + ROWS, t.rows))
        for row in T.unroll(row0, end_row, annotations=NOT_UNROLLED):
            for j in T.Parallel(HALF):
                t.out[query, row, column + j] = 0

    way_out = SimpleNamespace(write_tile=make_write_tile(out_tile), write_empty=write_empty)
    warpgroup = make_alternating_warpgroup(
        dtype,
        head_dim_qk,
        head_dim_v,
        blocks_of,
        way_out,
        read_sink=lambda row, t: t.attn_sink[T.min(t.tile[0] + row, t.rows - 1)],
        write_sums=write_sums,
        keeps_max=True,
    )
    producer = make_turn_producer(head_dim_qk, make_walk(blocks_of, read_index, address), blocks_of)

    play = make_turns(warpgroup, producer, TURN_REGISTERS)

    head_tiles = T.ceildiv(h_q, ROWS)
    run = T.max(T.min(s_q * head_tiles // CTAS_PER_RUN, LONGEST_RUN), 1)

    @T.prim_func
    def mla_sparse_prefill(
        q: T.StridedTensor((s_q, h_q, head_dim_qk), (q_stride_s, q_stride_h, 1), dtype),
        kv: T.StridedTensor((s_kv, head_dim_qk), (kv_stride, 1), dtype),
        indices: T.StridedTensor((s_q, topk), (indices_stride, 1), "int32"),
        topk_length: T.Tensor((s_q,), "int32"),
        out: T.Tensor((s_q, h_q, head_dim_v), dtype),
        max_logits: T.Tensor((s_q, h_q), accum),
        softmax_lse: T.Tensor((s_q, h_q), accum),
        attn_sink: T.Tensor((len_sink,), accum),
        softmax_scale_log2: T.float32,
        has_sink: T.int32,
    ):
        # Tiles of a query lie side by side: they read the same tokens.
        with T.Kernel(
            head_tiles * T.ceildiv(s_q, run), threads=NUM_TURN_THREADS, prelude=GATHER_SOURCE
        ) as run_and_tile:
            kv_shared = T.alloc_shared((NUM_STAGES + 1, BLOCK_N, STAGE_COLUMNS), dtype)
            maxima = T.alloc_shared((NUM_STAGES, ROWS), accum, scope="shared")  # running, after a block
            sums = T.alloc_shared((SUMS,), accum, scope="shared")
            tops = T.alloc_shared((SUMS,), accum, scope="shared")  # the same of largest scores
            valid = T.alloc_shared((NUM_STAGES, NUM_WARPS), "int32", scope="shared")
            tile = T.alloc_shared((3,), "int32", scope="shared")  # its first row, first query and last
            full = T.alloc_barrier(full_arrivals)  # a piece of a block is there
            empty = T.alloc_barrier(empty_arrivals)  # the warps that multiply with a piece of V, or with P, are done
            p_full = T.alloc_barrier([NUM_WARPS] * NUM_STAGES)  # the warps that make P are done
            q_full = T.alloc_barrier([1])
            met = T.alloc_barrier([2 * NUM_WARPS])  # the warps of both warpgroups have written a tile's sums
            true_max = T.alloc_local((2,), accum)

            tx = T.get_thread_binding()
            tiles = T.alloc_var("int32", init=head_tiles)
            line = T.alloc_var("int32", init=T.truncdiv(run_and_tile, tiles))
            if tx == 0:
                tile[0] = (run_and_tile - line * tiles) * ROWS
                tile[1] = line * run
                tile[2] = T.min((line + 1) * run, s_q) - 1
            T.sync_threads()
            t = SimpleNamespace(
                q=q,
                q_tile=q_tile,
                latent=kv,
                s_kv=s_kv,
                indices=indices,
                topk_length=topk_length,
                topk=topk,
                out=out,
                max_logits=max_logits,
                softmax_lse=softmax_lse,
                softmax_scale_log2=softmax_scale_log2,
                attn_sink=attn_sink,
                has_sink=has_sink,
                kv=kv_shared,
                maxima=maxima,
                sums=sums,
                tops=tops,
                true_max=true_max,
                valid=valid,
                tile=tile,
                full=full,
                empty=empty,
                p_full=p_full,
                q_full=q_full,
                met=met,
                tx=tx,
                rows=h_q,
                order=None,
                part=SimpleNamespace(begin_place=tile[1], end_place_inclusive=tile[2]),
            )
            play(t)

    return Program(mla_sparse_prefill, PASS_CONFIG)

"""Merging partial results on sm_90a, launched under the tail of the decode kernel.

With a small batch there are few rows and many splits: a row then gets a CTA, each warp takes a quarter of its columns,
and loads from many splits are under way at once. With a large batch there are many rows of few splits, most of which
need nothing: there each warp merges a row, so that launching CTAs does not become the cost.
"""

from collections.abc import Callable
from typing import Any

import tilelang.language as T

from tilemla.config import KernelConfig
from tilemla.dsl.attention import final_lse, inverse_sum, sink_share
from tilemla.dsl.combine import advance_max, count_splits, needs_combine, split_weight, start_max

_WARPS = 4
_LANES = 32
_VECTOR = 4  # fp32 elements of a 16-byte load


def sink_of_group(head, row, t) -> Any:
    """The attention sink of a row where `group_size` heads share a KV head."""
    return t.attn_sink[head, T.truncmod(row, t.group_size)]


def make_combine(
    head_dim_v: int,
    accum: str,
    config: KernelConfig,
    *,
    early: bool,
    read_sink: Callable[[Any, Any, Any], Any] = sink_of_group,
) -> Any:
    """Make the macro that opens the combine kernel.

    Parameters
    ----------
    head_dim_v : int
        Columns of a row.
    accum : str
        dtype of the partial results.
    config : KernelConfig
        Its ``full_grid`` and ``loads_ahead``.
    early : bool
        Whether the kernel is launched under the tail of the decode kernel and waits for its end itself.
    read_sink : callable
        Of head, row and t: the attention sink of the row.

    Returns
    -------
    macro
        ``combine(t, sizes)``; ``t`` holds the arguments of ``mla_decode`` that it reads and writes, by their names
        there, ``sizes`` ``batch_size``, ``num_heads_k`` and ``rows`` as expressions. A request that was not split is
        left alone.
    """

    def make_merge_row(vectors: int) -> Any:
        """Merge a row; a warp takes as many of its columns as `vectors` 16-byte loads of each lane cover."""
        ahead = config.loads_ahead // vectors  # splits

        @T.macro
        def load_splits(partial, t, head, row, column, first, begin, count):
            # As many splits from `begin` on as are under way at once, without waiting for them.
            lane = T.get_thread_binding() % _LANES
            for u in T.unroll(ahead):
                if begin + u < count:
                    for i in T.unroll(vectors):
                        for v in T.vectorized(_VECTOR):
                            partial[u, i * _VECTOR + v] = t.out_accum[
                                first + begin + u, head, row, column + (i * _LANES + lane) * _VECTOR + v
                            ]

        @T.macro
        def merge_row(t, request, head, row, column, first, count):
            lane = T.get_thread_binding() % _LANES
            partial = T.alloc_local((ahead, vectors * _VECTOR), accum)
            merged = T.alloc_local((vectors * _VECTOR,), accum)
            most = T.alloc_var(accum, init=start_max())
            weight = T.alloc_var(accum, init=0)  # of the split of this lane
            weight_sum = T.alloc_var(accum, init=0)
            for i in T.unroll(vectors * _VECTOR):
                merged[i] = 0
            for group in T.serial(T.ceildiv(count, ahead)):
                load_splits(partial, t, head, row, column, first, group * ahead, count)
                # Weights while the first partials are on their way.
                if group == 0:
                    for k in T.serial(T.ceildiv(count, _LANES)):
                        if k * _LANES + lane < count:
                            most = advance_max(most, t.lse_accum_log2[first + k * _LANES + lane, head, row])
                    most = T.warp_reduce_max(most)
                if group % (_LANES // ahead) == 0:
                    weight = 0
                    if group * ahead + lane < count:
                        weight = split_weight(t.lse_accum_log2[first + group * ahead + lane, head, row], most)
                    weight_sum += weight
                for u in T.unroll(ahead):
                    share = T.alloc_var(accum, init=T.shfl_sync(weight, group % (_LANES // ahead) * ahead + u))
                    if group * ahead + u < count:
                        for i in T.unroll(vectors * _VECTOR):
                            merged[i] += partial[u, i] * share
            weight_sum = T.warp_reduce_sum(weight_sum)
            factor = T.alloc_var(accum, init=inverse_sum(weight_sum))
            if t.has_sink != 0:
                sink = read_sink(head, row, t)
                factor = inverse_sum(weight_sum, sink_share(most, sink))
            for i in T.unroll(vectors):
                for v in T.vectorized(_VECTOR):
                    t.out[request, head, row, column + (i * _LANES + lane) * _VECTOR + v] = (
                        merged[i * _VECTOR + v] * factor
                    )
            if (lane == 0) & (column == 0):
                t.softmax_lse[request, head, row] = final_lse(weight_sum, most, t.lse_scale)

        return merge_row

    per_lane = head_dim_v // (_LANES * _VECTOR)
    merge_row_by_warp = make_merge_row(per_lane)
    merge_row_by_cta = make_merge_row(per_lane // _WARPS)

    @T.macro
    def combine(t, sizes):
        is_full = sizes.batch_size * sizes.num_heads_k * sizes.rows >= config.full_grid
        rows_per_cta = T.if_then_else(is_full, _WARPS, 1)
        with T.Kernel(
            sizes.batch_size, sizes.num_heads_k, T.ceildiv(sizes.rows, rows_per_cta), threads=_WARPS * _LANES
        ) as (request, head, row_block):
            # Not split, nothing to wait for: num_splits is older than the decode kernel.
            if needs_combine(t.num_splits, request):
                if early:
                    T.pdl_sync()
                warp = T.get_thread_binding() // _LANES
                first = t.num_splits[request]
                count = count_splits(t.num_splits, request)
                if rows_per_cta == 1:
                    merge_row_by_cta(t, request, head, row_block, warp * (head_dim_v // _WARPS), first, count)
                elif row_block * _WARPS + warp < sizes.rows:
                    merge_row_by_warp(t, request, head, row_block * _WARPS + warp, 0, first, count)

    return combine

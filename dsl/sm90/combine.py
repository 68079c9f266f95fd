"""Merging partial results on sm_90a, launched under the tail of the decode kernel.

A row of few splits needs one load or two of each lane, one of many a walk, and L2 is waited for at each step. With few
rows there may be many splits, and the GPU is empty: four warps then walk every fourth chunk of a row's splits, for a
quarter of its columns each CTA. More rows get a CTA, each warp a quarter of the columns, and many rows, of few splits
or none, a warp each, so that waves of CTAs do not become the cost.

However a row is shared, its sums are taken in the same order: results do not depend on the rest of the batch.

Loops are not unrolled beyond what keeps loads under way: nothing else runs while the instructions are fetched.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.config import KernelConfig
from tilemla.dsl.attention import final_lse, inverse_sum, sink_share
from tilemla.dsl.combine import advance_max, count_splits, needs_combine, split_weight, start_max
from tilemla.dsl.sm90.tile import NOT_UNROLLED

_WARPS = 4
_LANES = 32
_VECTOR = 4  # fp32 elements of a 16-byte load
# Chunk i of a row's splits is of slice i modulo this. A slice is summed up by itself, then they are added in order.
_SLICES = _WARPS
_MOST_DEEP_ROWS = 256  # up to which a row gets four CTAs


def sink_of_group(head, row, t) -> Any:
    """The attention sink of a row where `group_size` heads share a KV head."""
    return t.attn_sink[head, T.truncmod(row, t.group_size)]


def make_combine(
    head_dim_v: int,
    accum: str,
    config: KernelConfig,
    *,
    early: bool,
    interleaved: int = 0,
    ctas_per_sm: int = 5,
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
        Its ``full_grid`` and ``splits_ahead``.
    early : bool
        Whether the kernel is launched under the tail of the decode kernel and waits for its end itself.
    interleaved : int
        How many columns of a partial row alternate by twos with as many that follow them, as threads hold them that
        write two of both at once; 0 where none do.
    ctas_per_sm : int
        CTAs that the registers of an SM are to suffice for.
    read_sink : callable
        Of head, row and t: the attention sink of the row.

    Returns
    -------
    macro
        ``combine(t, sizes)``; ``t`` holds the arguments of ``mla_decode`` that it reads and writes, by their names
        there, ``sizes`` ``batch_size``, ``num_heads_k`` and ``rows`` as expressions. A request that was not split is
        left alone.
    """
    chunk = config.splits_ahead  # splits

    def make_merge(vectors: int, ahead: int) -> SimpleNamespace:
        """Make the macros that merge columns of a row: of few splits, in a warp, with the other warps of a CTA.

        A warp takes as many columns as `vectors` 16-byte loads of each lane cover, and loads `ahead` splits at once.
        """
        width = vectors * _VECTOR  # of a lane

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
        def sum_slice(total, weight_sum: T.Ref, most: T.Ref, t, head, row, column, first, count, number, finds_most):
            lane = T.get_thread_binding() % _LANES
            partial = T.alloc_local((ahead, width), accum)
            weight = T.alloc_var(accum, init=0)  # of the split of this lane
            weight_sum = 0
            for i in T.unroll(width):
                total[i] = 0
            for step in T.unroll(T.ceildiv(T.ceildiv(count, chunk) - number, _SLICES), annotations=NOT_UNROLLED):
                begin = T.alloc_var("int32", init=(step * _SLICES + number) * chunk)
                for group in T.unroll(T.ceildiv(T.min(count - begin, chunk), ahead), annotations=NOT_UNROLLED):
                    load_splits(partial, t, head, row, column, first, begin + group * ahead, count)
                    # Weights while the first partials are on their way.
                    if finds_most & (step == 0) & (group == 0):
                        for k in T.unroll(T.ceildiv(count, _LANES), annotations=NOT_UNROLLED):
                            if k * _LANES + lane < count:
                                most = advance_max(most, t.lse_accum_log2[first + k * _LANES + lane, head, row])
                        most = T.warp_reduce_max(most)
                    if group == 0:
                        weight = 0
                        if (lane < chunk) & (begin + lane < count):
                            weight = split_weight(t.lse_accum_log2[first + begin + lane, head, row], most)
                        weight_sum += weight
                    for u in T.unroll(ahead):
                        share = T.alloc_var(accum, init=T.shfl_sync(weight, group * ahead + u))
                        if begin + group * ahead + u < count:
                            for i in T.unroll(width):
                                total[i] += partial[u, i] * share
            weight_sum = T.warp_reduce_sum(weight_sum)

        def first_column(lane):
            # of the four that a lane writes
            if interleaved:
                lanes = interleaved // 2
                return lane // lanes * (2 * interleaved) + lane % 2 * interleaved + lane % lanes // 2 * _VECTOR
            return lane * _VECTOR

        @T.macro
        def exchange_pairs(merged):
            # Even lanes get four of the first columns, odd lanes four of those that follow.
            is_odd = T.get_thread_binding() % 2 == 1
            for i in T.unroll(vectors):
                for v in T.unroll(2):
                    first = merged[i * _VECTOR + v]
                    second = merged[i * _VECTOR + 2 + v]
                    other = T.alloc_var(accum, init=T.shfl_xor(T.if_then_else(is_odd, first, second), 1))
                    merged[i * _VECTOR + v] = T.if_then_else(is_odd, other, first)
                    merged[i * _VECTOR + 2 + v] = T.if_then_else(is_odd, second, other)

        @T.macro
        def write(merged, weight_sum, most, t, request, head, row, column):
            lane = T.get_thread_binding() % _LANES
            factor = T.alloc_var(accum, init=inverse_sum(weight_sum))
            if t.has_sink != 0:
                sink = read_sink(head, row, t)
                factor = inverse_sum(weight_sum, sink_share(most, sink))
            if interleaved:
                exchange_pairs(merged)
            for i in T.unroll(vectors):
                for v in T.vectorized(_VECTOR):
                    t.out[request, head, row, column + i * _LANES * _VECTOR + first_column(lane) + v] = (
                        merged[i * _VECTOR + v] * factor
                    )
            if (lane == 0) & (column == 0):
                t.softmax_lse[request, head, row] = final_lse(weight_sum, most, t.lse_scale)

        @T.macro
        def merge_few(t, request, head, row, column, first, count):
            # One chunk at most: what is summed up first is all.
            merged = T.alloc_local((width,), accum)
            most = T.alloc_var(accum, init=start_max())
            weight_sum = T.alloc_var(accum, init=0)
            sum_slice(merged, weight_sum, most, t, head, row, column, first, count, 0, True)
            write(merged, weight_sum, most, t, request, head, row, column)

        @T.macro
        def merge_alone(t, request, head, row, column, first, count):
            total = T.alloc_local((width,), accum)
            merged = T.alloc_local((width,), accum)
            most = T.alloc_var(accum, init=start_max())
            weight_sum = T.alloc_var(accum, init=0)
            merged_weights = T.alloc_var(accum, init=0)
            for i in T.unroll(width):
                merged[i] = 0
            for number in T.unroll(T.min(T.ceildiv(count, chunk), _SLICES), annotations=NOT_UNROLLED):
                sum_slice(total, weight_sum, most, t, head, row, column, first, count, number, number == 0)
                merged_weights += weight_sum
                for i in T.unroll(width):
                    merged[i] += total[i]
            write(merged, merged_weights, most, t, request, head, row, column)

        @T.macro
        def merge_together(t, request, head, row, column, first, count, totals, weight_sums):
            lane = T.get_thread_binding() % _LANES
            number = T.get_thread_binding() // _LANES
            total = T.alloc_local((width,), accum)
            merged = T.alloc_local((width,), accum)
            most = T.alloc_var(accum, init=start_max())
            weight_sum = T.alloc_var(accum, init=0)
            merged_weights = T.alloc_var(accum, init=0)
            sum_slice(total, weight_sum, most, t, head, row, column, first, count, number, True)
            for i in T.vectorized(width):
                totals[number, lane * width + i] = total[i]
            if lane == 0:
                weight_sums[number] = weight_sum
            T.sync_threads()
            if number == 0:
                for i in T.unroll(width):
                    merged[i] = 0
                for k in T.unroll(_SLICES):
                    if k * chunk < count:
                        merged_weights += weight_sums[k]
                        for i in T.unroll(width):
                            merged[i] += totals[k, lane * width + i]
                write(merged, merged_weights, most, t, request, head, row, column)

        return SimpleNamespace(few=merge_few, alone=merge_alone, together=merge_together)

    columns = _LANES * _VECTOR  # that a load of a warp's covers
    vectors = head_dim_v // columns  # of a row
    merge_load = make_merge(1, chunk)
    merge_row = make_merge(vectors, max(chunk // vectors, 1))

    @T.macro
    def combine(t, sizes):
        num_rows = sizes.batch_size * sizes.num_heads_k * sizes.rows
        is_full = num_rows * _WARPS >= config.full_grid
        is_deep = num_rows <= _MOST_DEEP_ROWS
        ctas = T.if_then_else(
            is_full, T.ceildiv(sizes.rows, _WARPS), T.if_then_else(is_deep, sizes.rows * vectors, sizes.rows)
        )
        with T.Kernel(sizes.batch_size, sizes.num_heads_k, ctas, threads=_WARPS * _LANES) as (request, head, cta):
            T.annotate_min_blocks_per_sm(ctas_per_sm)
            totals = T.alloc_shared((_SLICES, columns), accum, scope="shared")
            weight_sums = T.alloc_shared((_SLICES,), accum, scope="shared")
            # Not split, nothing to wait for: num_splits is older than the decode kernel.
            if needs_combine(t.num_splits, request):
                if early:
                    T.pdl_sync()
                warp = T.get_thread_binding() // _LANES
                first = t.num_splits[request]
                count = count_splits(t.num_splits, request)
                if is_full:
                    row = T.alloc_var("int32", init=cta * _WARPS + warp)
                    if row < sizes.rows:
                        if count <= chunk:
                            merge_row.few(t, request, head, row, 0, first, count)
                        else:  # registers for a row of both sums would halve the warps that there are of all others
                            for i in T.unroll(vectors, annotations=NOT_UNROLLED):
                                merge_load.alone(t, request, head, row, i * columns, first, count)
                elif is_deep:
                    merge_load.together(
                        t, request, head, cta // vectors, cta % vectors * columns, first, count, totals, weight_sums
                    )
                else:
                    for i in T.serial(vectors // _WARPS):
                        merge_load.alone(t, request, head, cta, (i * _WARPS + warp) * columns, first, count)

    return combine

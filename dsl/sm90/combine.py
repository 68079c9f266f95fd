"""Merging partial results on sm_90a: one warp a row, launched under the tail of the decode kernel."""

from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import final_lse, inverse_sum
from tilemla.dsl.combine import advance_max, count_splits, needs_combine, split_weight, start_max

_WARPS = 4
_LANES = 32
_VECTOR = 4  # fp32 elements of a 16-byte load
_AHEAD = 4  # splits whose partial outputs are under way at once: a serial loop would wait for L2 at each


def make_combine(head_dim_v: int, accum: str) -> Any:
    """Make the macro that opens the combine kernel.

    Parameters
    ----------
    head_dim_v : int
        Columns of a row.
    accum : str
        dtype of the partial results.

    Returns
    -------
    macro
        ``combine(out_accum, lse_accum_log2, num_splits, out, softmax_lse, sizes)``; ``sizes`` holds ``batch_size``,
        ``num_heads_k`` and ``rows`` as expressions. A request that was not split is left alone.
    """
    per_lane = head_dim_v // _LANES

    @T.macro
    def combine(out_accum, lse_accum_log2, num_splits, out, softmax_lse, sizes):
        with T.Kernel(sizes.batch_size, sizes.num_heads_k, T.ceildiv(sizes.rows, _WARPS), threads=_WARPS * _LANES) as (
            request,
            head,
            row_block,
        ):
            # Not split, nothing to wait for: num_splits is older than the decode kernel.
            if needs_combine(num_splits, request):
                T.pdl_sync()
                lane = T.get_thread_binding() % _LANES
                row = row_block * _WARPS + T.get_thread_binding() // _LANES
                first = num_splits[request]
                count = count_splits(num_splits, request)
                partial = T.alloc_local((_AHEAD, per_lane), accum)
                merged = T.alloc_local((per_lane,), accum)
                if row < sizes.rows:
                    most = T.alloc_var(accum, init=start_max())
                    weight = T.alloc_var(accum, init=0)  # of the split of this lane
                    weight_sum = T.alloc_var(accum, init=0)
                    for i in T.unroll(per_lane):
                        merged[i] = 0
                    for k in T.serial(T.ceildiv(count, _LANES)):
                        if k * _LANES + lane < count:
                            most = advance_max(most, lse_accum_log2[first + k * _LANES + lane, head, row])
                    most = T.warp_reduce_max(most)
                    for k in T.serial(T.ceildiv(count, _LANES)):
                        weight = 0
                        if k * _LANES + lane < count:
                            weight = split_weight(lse_accum_log2[first + k * _LANES + lane, head, row], most)
                        weight_sum += weight
                        for m in T.serial(T.ceildiv(T.min(count - k * _LANES, _LANES), _AHEAD)):
                            for u in T.unroll(_AHEAD):
                                # past the last split: the last one again, with the weight 0 of an idle lane
                                slot = first + T.min(k * _LANES + m * _AHEAD + u, count - 1)
                                for i in T.unroll(per_lane // _VECTOR):
                                    for v in T.vectorized(_VECTOR):
                                        partial[u, i * _VECTOR + v] = out_accum[
                                            slot, head, row, (i * _LANES + lane) * _VECTOR + v
                                        ]
                            for u in T.unroll(_AHEAD):
                                share = T.alloc_var(accum, init=T.shfl_sync(weight, m * _AHEAD + u))
                                for i in T.unroll(per_lane):
                                    merged[i] += partial[u, i] * share
                    weight_sum = T.warp_reduce_sum(weight_sum)
                    for i in T.unroll(per_lane // _VECTOR):
                        for v in T.vectorized(_VECTOR):
                            out[request, head, row, (i * _LANES + lane) * _VECTOR + v] = merged[
                                i * _VECTOR + v
                            ] * inverse_sum(weight_sum)
                    if lane == 0:
                        softmax_lse[request, head, row] = final_lse(weight_sum, most)

    return combine

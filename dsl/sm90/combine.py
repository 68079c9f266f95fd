"""Merging partial results on sm_90a: one warp a row, launched under the tail of the decode kernel."""

from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import final_lse, inverse_sum
from tilemla.dsl.combine import advance_max, count_splits, needs_combine, split_weight, start_max

_WARPS = 4
_LANES = 32
_VECTOR = 4  # fp32 elements of a 16-byte load


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
    chunks = head_dim_v // (_LANES * _VECTOR)

    @T.macro
    def combine(out_accum, lse_accum_log2, num_splits, out, softmax_lse, sizes):
        with T.Kernel(T.ceildiv(sizes.rows, _WARPS), sizes.num_heads_k, sizes.batch_size, threads=_WARPS * _LANES) as (
            row_block,
            head,
            request,
        ):
            # Not split, nothing to wait for: num_splits is older than the decode kernel.
            if needs_combine(num_splits, request):
                T.pdl_sync()
                lane = T.get_thread_binding() % _LANES
                row = row_block * _WARPS + T.get_thread_binding() // _LANES
                first = num_splits[request]
                count = count_splits(num_splits, request)
                partial = T.alloc_local((chunks * _VECTOR,), accum)
                merged = T.alloc_local((chunks * _VECTOR,), accum)
                if row < sizes.rows:
                    most = T.alloc_var(accum, init=start_max())
                    weight_sum = T.alloc_var(accum, init=0)
                    for k in T.serial(T.ceildiv(count, _LANES)):
                        if k * _LANES + lane < count:
                            most = advance_max(most, lse_accum_log2[first + k * _LANES + lane, head, row])
                    most = T.warp_reduce_max(most)
                    for k in T.serial(T.ceildiv(count, _LANES)):
                        if k * _LANES + lane < count:
                            weight_sum += split_weight(lse_accum_log2[first + k * _LANES + lane, head, row], most)
                    weight_sum = T.warp_reduce_sum(weight_sum)
                    for i in T.unroll(chunks * _VECTOR):
                        merged[i] = 0
                    for k in T.serial(count):
                        weight = T.alloc_var(
                            accum,
                            init=split_weight(lse_accum_log2[first + k, head, row], most) * inverse_sum(weight_sum),
                        )
                        for i in T.unroll(chunks):
                            for v in T.vectorized(_VECTOR):
                                partial[i * _VECTOR + v] = out_accum[
                                    first + k, head, row, (i * _LANES + lane) * _VECTOR + v
                                ]
                        for i in T.unroll(chunks * _VECTOR):
                            merged[i] += partial[i] * weight
                    for i in T.unroll(chunks):
                        for v in T.vectorized(_VECTOR):
                            out[request, head, row, (i * _LANES + lane) * _VECTOR + v] = merged[i * _VECTOR + v]
                    if lane == 0:
                        softmax_lse[request, head, row] = final_lse(weight_sum, most)

    return combine

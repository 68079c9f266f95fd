"""The online softmax of a score warpgroup on a thread's own elements, and the end of its sums."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import (
    advance_max,
    final_lse,
    inverse_sum,
    partial_lse_log2,
    probability,
    rescale_factor,
    sink_share,
)
from tilemla.dsl.schedule import is_split, split_slot
from tilemla.dsl.sm90.tile import SCORES


def is_in_one_part(place, t) -> Any:
    """Whether the schedule left the request at a place whole, bool."""
    return T.Not(is_split(t.part, place))


def make_advance(*, keeps_max: bool = False) -> Any:
    """Make the macro ``advance(scores, running_max, row_sum, alpha, t)``: the step on a thread's maxima and sums.

    ``alpha`` gets what accumulators are to be multiplied by.

    Parameters
    ----------
    keeps_max : bool
        Whether ``t.true_max`` gets the largest scaled score of each of a thread's rows: the running maximum is lazy.
    """
    accum = "float32"

    @T.macro
    def advance(scores, running_max, row_sum, alpha, t):
        block_max = T.alloc_local((4,), accum)
        # Two chains a row: one is bound by its latency.
        for chain in T.unroll(4):
            block_max[chain] = T.max(scores[chain * 2], scores[chain * 2 + 1])
        for e in T.unroll(SCORES - 8):
            block_max[e % 8 // 2] = T.max(block_max[e % 8 // 2], scores[8 + e])
        for half in T.unroll(2):
            block_max[half] = T.max(block_max[half], block_max[half + 2])
        for half in T.unroll(2):
            block_max[half] = T.max(block_max[half], T.shfl_xor(block_max[half], 1))
        for half in T.unroll(2):
            block_max[half] = T.max(block_max[half], T.shfl_xor(block_max[half], 2))
        if keeps_max:
            for half in T.unroll(2):
                t.true_max[half] = T.max(t.true_max[half], block_max[half] * t.softmax_scale_log2)
        for half in T.unroll(2):
            block_max[half] = advance_max(running_max[half], block_max[half] * t.softmax_scale_log2)
            alpha[half] = rescale_factor(running_max[half], block_max[half])
            running_max[half] = block_max[half]
            row_sum[half] = row_sum[half] * alpha[half]

    return advance


def make_softmax(
    head_dim_v: int,
    *,
    alpha_slot: Callable[[Any, Any], Any],
    inverse_sum_index: Callable[[Any, Any], Any],
    read_sink: Callable[[Any, Any], Any],
) -> SimpleNamespace:
    """Make the macros ``soften``, ``normalise`` and ``write_lse``.

    Parameters
    ----------
    head_dim_v : int
        The stage's column where P goes.
    alpha_slot : callable
        Of block and stage: which of the two rows of ``t.alpha`` the block's factors go to.
    inverse_sum_index : callable
        Of stage and row: where in ``t.inverse_sum`` a row's factor goes.
    read_sink : callable
        Of a row of the tile and t: the attention sink of the row's head.
    """
    accum = "float32"
    advance = make_advance()

    @T.macro
    def soften(scores, running_max, row_sum, block, stage, row, column, t):
        # Scores to P in the stage's columns behind V, with the step on maximum and sum, and alpha for the accumulators.
        alpha = T.alloc_local((2,), accum)
        advance(scores, running_max, row_sum, alpha, t)
        if t.tx % 4 == 0:
            for half in T.unroll(2):
                t.alpha[alpha_slot(block, stage), row + half * 8] = alpha[half]
        for pair in T.unroll(SCORES // 2):
            for v in T.unroll(2):
                scores[pair * 2 + v] = probability(scores[pair * 2 + v], t.softmax_scale_log2, running_max[pair % 2])
            row_sum[pair % 2] = row_sum[pair % 2] + (scores[pair * 2] + scores[pair * 2 + 1])
            for v in T.vectorized(2):
                t.kv[stage, row + pair % 2 * 8, head_dim_v + pair // 2 * 8 + column + v] = scores[pair * 2 + v]

    @T.macro
    def normalise(place, stage, row, row_sum, running_max, t):
        # The sums over a row's threads, and what its outputs are multiplied by. Its threads write the same value.
        share = T.alloc_local((2,), accum)
        for half in T.unroll(2):
            row_sum[half] = row_sum[half] + T.shfl_xor(row_sum[half], 1)
            row_sum[half] = row_sum[half] + T.shfl_xor(row_sum[half], 2)
            share[half] = 0
        if t.has_sink != 0:
            # A piece of a split request leaves the sink to the combine kernel.
            if is_in_one_part(place, t):
                for half in T.unroll(2):
                    sink = read_sink(row + half * 8, t)
                    share[half] = sink_share(running_max[half], sink)
        for half in T.unroll(2):
            t.inverse_sum[inverse_sum_index(stage, row + half * 8)] = inverse_sum(row_sum[half], share[half])

    @T.macro
    def write_lse(place, request, row, row_sum, running_max, t):
        if is_split(t.part, place):
            slot = split_slot(t.part, place, request, t.num_splits)
            t.lse_accum_log2[slot, t.head, row] = partial_lse_log2(row_sum, running_max)
        else:
            t.softmax_lse[request, t.head, row] = final_lse(row_sum, running_max, t.lse_scale)

    return SimpleNamespace(soften=soften, normalise=normalise, write_lse=write_lse)

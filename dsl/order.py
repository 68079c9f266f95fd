"""An order of the requests in which few of them are cut, made for a plan's payload.

Parts are filled one after the other, each by the longest request that still fits; when none does, the longest of all
is next: it is cut if the plan cuts, else it opens the next part. Of equally long requests the first comes first.
"""

from typing import Any

import tilelang.language as T

from tilemla.dsl.plans import LEFT, NEVER, NUM_UNORDERED, PARTS, mark_play, play_request, start_play
from tilemla.dsl.schedule import MOST_ORDERED, ORDERED

_LANES = 32
_PER_LANE = MOST_ORDERED // _LANES
_TOO_LONG = 2 * MOST_ORDERED  # added to the rank of a request that does not fit
# Where a request is as long as this, in blocks, nothing is ordered: keys of blocks and rank are 32 bits.
_MOST_BLOCKS = 1 << 22


def may_be_keys(ranked_blocks) -> Any:
    """Whether requests are short enough to be ordered, bool."""
    return ranked_blocks[0] < _MOST_BLOCKS


@T.macro
def rank_of(rank: T.Ref, num_blocks, request, batch_size) -> None:
    """Count the requests that are longer than `request`, or as long and before it. `rank` is passed by reference."""
    rank = 0
    for other in T.serial(batch_size):
        is_before = (num_blocks[other] > num_blocks[request]) | (
            (num_blocks[other] == num_blocks[request]) & (other < request)
        )
        rank += T.if_then_else(is_before, 1, 0)


@T.macro
def play_ordered_cpu(
    played, order, is_taken, ranked, ranked_blocks, batch_size, payload, cuts_requests, overhead
) -> None:
    """Play a plan through and write its order, the requests by place.

    ``ranked`` and ``ranked_blocks`` are the requests by rank and their blocks, ``is_taken`` room for a flag of each.
    """
    for rank in T.serial(batch_size):
        is_taken[rank] = 0
    start_play(played, ORDERED, 0, payload, overhead)
    for place in T.serial(batch_size):
        chosen = T.alloc_var("int32", init=0)
        chosen = NEVER
        for rank in T.serial(batch_size):
            fits = ranked_blocks[rank] + overhead <= played[LEFT]
            if is_taken[rank] == 0:
                chosen = T.min(chosen, rank + T.if_then_else(fits, 0, _TOO_LONG))
        chosen = T.bitwise_and(chosen, _TOO_LONG - 1)
        is_taken[chosen] = 1
        order[place] = ranked[chosen]
        if place == 0:
            start_play(played, ORDERED, ranked_blocks[chosen], payload, overhead)
        play_request(played, ORDERED + place, ranked_blocks[chosen], payload, cuts_requests, overhead)


@T.macro
def play_ordered_warp(
    played,
    orders,
    marks,
    plan,
    ranked,
    ranked_blocks,
    batch_size,
    num_sm_parts,
    segment_size,
    payload,
    cuts_requests,
    overhead,
    lane,
) -> None:
    """The same by a warp, whose lanes play alike and look for the next request together.

    The order goes to the plan's row of ``orders``, and what `mark_play` marks to ``marks``. A plan that fails is left.
    """
    row = plan - NUM_UNORDERED
    segment = T.alloc_var("int32", init=0)
    # Of every 32nd request by rank a key, the larger the longer, then the earlier; 0 once it is placed.
    own = T.alloc_local((_PER_LANE,), "int32")
    for i in T.unroll(_PER_LANE):
        rank = i * _LANES + lane
        own[i] = T.if_then_else(rank < batch_size, ranked_blocks[rank] * MOST_ORDERED + (MOST_ORDERED - rank), 0)
    start_play(played, ORDERED, 0, payload, overhead)
    place = T.alloc_var("int32", init=0)
    while (place < batch_size) & (played[PARTS] <= num_sm_parts):
        spare = T.min(played[LEFT] - overhead, _MOST_BLOCKS)
        limit = T.alloc_var("int32", init=T.if_then_else(spare < 0, 0, spare * MOST_ORDERED + MOST_ORDERED))
        chosen = T.alloc_var("int32", init=0)
        chosen = 0
        for i in T.unroll(_PER_LANE):
            chosen = T.max(chosen, T.Select(own[i] <= limit, own[i], 0))
        chosen = T.warp_reduce_max(chosen)
        if chosen == 0:
            for i in T.unroll(_PER_LANE):
                chosen = T.max(chosen, own[i])
            chosen = T.warp_reduce_max(chosen)
        for i in T.unroll(_PER_LANE):
            own[i] = T.Select(own[i] == chosen, 0, own[i])
        num_blocks = T.alloc_var("int32", init=T.shift_right(chosen - 1, MOST_ORDERED.bit_length() - 1))
        if place == 0:
            start_play(played, ORDERED, num_blocks, payload, overhead)
        if place == segment * segment_size:
            if lane == 0:
                mark_play(marks, segment, plan, played)
            segment += 1
        if lane == 0:
            orders[row, place] = ranked[MOST_ORDERED - 1 - T.bitwise_and(chosen - 1, MOST_ORDERED - 1)]
        play_request(played, ORDERED + place, num_blocks, payload, cuts_requests, overhead)
        place += 1

"""What the tile scheduler tries: plans, how one is played through, and what it costs.

A plan has a payload, may cut requests or may not, and visits the requests in an order: as they come, or by one that
leaves few of them to be cut (`order`). A plan costs its payload, since parts run side by side, and where it cuts, what
merging costs (``tilemla.costs``):

- for cutting at all; with orders half of it is the combine kernel's and stays whatever is cut, and half follows the
  number of cuts;
- for the pieces of the request that is cut most, each of which costs the more the more there are beyond
  `_SHORT_WALK`: the combine kernel walks them;
- for using more than half of the parts: the combine kernel starts late where few multiprocessors are free before the
  parts end.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.schedule import MOST_ORDERED, PLACES_PER_ROW

PAYLOADS = 16  # that are tried with requests as they come, from the equal share on
ORDERED_PAYLOADS = 6  # with requests in an order: it is made for a payload, and takes longer
# Of these as many plans that cut requests, and then as many that do not; plans of an order come last.
NUM_UNORDERED = 2 * PAYLOADS
NUM_ORDERED = 2 * ORDERED_PAYLOADS

# Of the state of a plan that is played: parts so far, what the open one may still take, cuts of all requests; which
# place the open part begins with, which split of it, and what was left then; cuts of the request that is cut most.
PARTS, LEFT, CUTS, OPENED_BY, OPENED_SPLIT, OPENED_LEFT, _MOST_CUTS, PLAYED_SIZE = range(8)
NUM_MARKED = _MOST_CUTS  # of these, a walk goes on from the first ones
_LOOKING_UP = 8  # what an order costs: requests are looked up one after the other, from memory, in eighths of a block
_SHORT_WALK = 64  # pieces
_MOST_WEIGHED = 256  # pieces, more than a GPU has parts: what they cost stays below what it takes for never
NEVER = 1 << 14  # more than there can be parts; 65,536 times that is still an int32


def share_of(total_cost, num_sm_parts) -> Any:
    """The equal share of the parts, int32."""
    return T.truncdiv(total_cost + num_sm_parts - 1, num_sm_parts)


def _excess(plan):
    return T.if_then_else(plan < NUM_UNORDERED, plan % PAYLOADS, (plan - NUM_UNORDERED) % ORDERED_PAYLOADS)


def payload_of(plan, share) -> Any:
    """What a part may take in plan number `plan`, int32."""
    return share + _excess(plan)


def may_cut(plan) -> Any:
    """Whether plan number `plan` may cut requests, int32."""
    cuts = T.if_then_else(plan < NUM_UNORDERED, plan < PAYLOADS, plan < NUM_UNORDERED + ORDERED_PAYLOADS)
    return T.if_then_else(cuts, 1, 0)


def is_ordered(plan) -> Any:
    """Whether plan number `plan` visits requests in an order of its own, bool."""
    return plan >= NUM_UNORDERED


def may_order(reorder, batch_size, num_sm_parts) -> Any:
    """Whether an order is wanted, has a place in the schedule and can leave fewer cuts, bool.

    With more than two parts for each request, each is cut anyhow.
    """
    return (
        (reorder != 0)
        & (batch_size <= T.min(MOST_ORDERED, PLACES_PER_ROW * num_sm_parts))
        & (2 * batch_size >= num_sm_parts)
        & (batch_size > 1)
    )


@T.macro
def start_play(played, place, first_blocks, payload, overhead) -> None:
    """Begin to count at the first place with a part open, which takes `first_blocks` of its request if they fit."""
    for i in T.unroll(PLAYED_SIZE):
        played[i] = 0
    played[PARTS] = 1
    played[LEFT] = payload
    played[OPENED_BY] = place
    played[OPENED_LEFT] = payload - overhead - first_blocks


@T.macro
def mark_play(marks, segment, plan, played) -> None:
    """Keep what a walk goes on from at the first place of a segment."""
    for i in T.unroll(NUM_MARKED):
        marks[i, segment, plan] = played[i]


@T.macro
def play_request(played, place, num_blocks, payload, cuts_requests, overhead) -> None:
    """Count on with a request of so many blocks; too many parts if the plan fails."""
    # Without branches but for what is seldom: this is what lanes of a warp wait for, for each request.
    room = payload - overhead  # for blocks in a part of their own
    spare = T.alloc_var("int32", init=played[LEFT] - overhead)  # for blocks in the open part
    fits = num_blocks <= spare
    is_begun = (cuts_requests != 0) & (spare > 0)  # there, if it does not fit
    rest = T.alloc_var("int32", init=num_blocks - T.Select(is_begun, spare, 0))  # then, for the parts after
    pieces = T.alloc_var("int32", init=1)
    left = T.alloc_var("int32", init=room - rest)
    if T.Not(fits) & (rest > room):
        if cuts_requests != 0:
            pieces = T.truncdiv(rest + room - 1, room)
            left = room - (rest - (pieces - 1) * room)
        else:
            pieces = NEVER
    cuts = T.alloc_var("int32", init=T.Select(fits, 0, pieces - T.Select(is_begun, 0, 1)))
    played[PARTS] += T.Select(fits, 0, pieces)
    played[LEFT] = T.Select(fits, spare - num_blocks, left)
    played[CUTS] += cuts
    played[_MOST_CUTS] = T.max(played[_MOST_CUTS], cuts)
    played[OPENED_BY] = T.Select(fits, played[OPENED_BY], place)
    played[OPENED_SPLIT] = T.Select(fits, played[OPENED_SPLIT], cuts)
    played[OPENED_LEFT] = T.Select(fits, played[OPENED_LEFT], left)


def plan_cost(played, plan, costs: SimpleNamespace) -> Any:
    """What a plan that was played costs more than an equal share, in eighths of a block, int32; NEVER if it fails.

    ``costs`` are num_sm_parts, combine_eighths, piece_64ths, crowded_eighths and may_order, whether plans of an order
    are compared.
    """
    pieces = T.min(played[_MOST_CUTS] + 1, _MOST_WEIGHED)
    cuts = T.min(played[CUTS], costs.num_sm_parts)
    weighed = T.truncdiv(costs.combine_eighths * (costs.num_sm_parts + cuts), 2 * costs.num_sm_parts)
    merging = (
        T.if_then_else(costs.may_order, weighed, costs.combine_eighths)
        + T.truncdiv(pieces * T.max(pieces, _SHORT_WALK) * costs.piece_64ths, 8 * _SHORT_WALK)
        + T.if_then_else(2 * played[PARTS] > costs.num_sm_parts, costs.crowded_eighths, 0)
    )
    cost = 8 * _excess(plan) + T.if_then_else(played[_MOST_CUTS] > 0, merging, 0)
    cost = cost + T.if_then_else(is_ordered(plan), _LOOKING_UP, 0)
    return T.min(cost + T.if_then_else(played[PARTS] <= costs.num_sm_parts, 0, NEVER), NEVER)

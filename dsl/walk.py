"""The walk that carries a plan out: gives the blocks of requests to parts and writes the parts' rows.

It follows FlashMLA's ``get_mla_metadata``: a request costs its blocks plus a fixed overhead, and parts are filled in
order. Within its payload a part takes whole requests while they fit, then cuts the next one, or, in a plan without
cuts, leaves it to the next part.

With a sliding window the blocks of a request are those that some of its queries sees. The walk counts from the first of
them, and what it writes counts from the start of the cache.
"""

from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import first_visible_block
from tilemla.dsl.plans import LEFT, OPENED_BY, OPENED_LEFT, OPENED_SPLIT, PARTS
from tilemla.dsl.schedule import BLOCK_N, PLACES_PER_ROW, Part, count_blocks, write_part

# Names of the elements of the walk's state, a local int32 buffer. The first three are the open part's row so far.
_BEGIN_PLACE, _BEGIN_BLOCK, _BEGIN_SPLIT, _PART, _REMAINING, _BLOCK, SPLIT, STATE_SIZE = range(8)


def first_visible(cache_seqlen, seq_len_q, window_left) -> Any:
    """The first block that some query sees, int32."""
    return first_visible_block(cache_seqlen, seq_len_q, window_left, BLOCK_N)


def blocks_of(cache_seqlen) -> Any:
    """Blocks of a sequence, int32."""
    return count_blocks(cache_seqlen, BLOCK_N)


def count_visible(cache_seqlen, seq_len_q, window_left) -> Any:
    """Blocks that some query sees, int32."""
    return blocks_of(cache_seqlen) - first_visible(cache_seqlen, seq_len_q, window_left)


def request_at_step(orders, row, ordered, step) -> Any:
    """The request at a step of the walk, int32: of an order, a row of `orders`, where there is one."""
    return T.if_then_else(ordered, orders[row, step], step)


def four_places(orders, row, part, batch_size) -> Any:
    """What part `part`'s row says of an order, a row of `orders`, int32: the requests at its four places."""
    four = 0
    for i in range(PLACES_PER_ROW):
        place = part * PLACES_PER_ROW + i
        four = four + T.if_then_else(place < batch_size, T.shift_left(orders[row, place], 8 * i), 0)
    return four


@T.macro
def close_part(metadata, state, end_place_inclusive, end_block, is_cut) -> None:
    """Write the open part's row. `is_cut`: its last request goes on in the next part."""
    is_one_request = state[_BEGIN_PLACE] == end_place_inclusive
    is_begun_before = T.if_then_else(state[_BEGIN_SPLIT] > 0, 1, 0)
    row = Part(
        begin_place=state[_BEGIN_PLACE],
        end_place_inclusive=end_place_inclusive,
        begin_block=state[_BEGIN_BLOCK],
        end_block=end_block,
        begin_split=state[_BEGIN_SPLIT],
        is_first_request_split=T.if_then_else(is_one_request, T.max(is_begun_before, is_cut), is_begun_before),
        is_last_request_split=T.if_then_else(is_one_request, T.max(is_begun_before, is_cut), is_cut),
    )
    write_part(metadata, state[_PART], row)


@T.macro
def start_walk(state, place, first, payload) -> None:
    """Open the first part at block `first` of the request at the first place."""
    for i in T.unroll(STATE_SIZE):
        state[i] = 0
    state[_BEGIN_PLACE] = place
    state[_BEGIN_BLOCK] = first
    state[_REMAINING] = payload


@T.macro
def walk_request(
    metadata, state, place, first, end, previous_end, payload, cuts_requests, num_sm_parts, overhead
) -> None:
    """Give blocks `first` to `end` of a request to the open part and, while they do not fit, to the parts after it.

    Leaves the number of its last split in the state.
    """
    state[_BLOCK] = first
    state[SPLIT] = 0
    while (state[_REMAINING] < end - state[_BLOCK] + overhead) & (state[_PART] < num_sm_parts - 1):
        if (state[_REMAINING] > overhead) & (cuts_requests != 0):
            state[_BLOCK] = state[_BLOCK] + state[_REMAINING] - overhead
            state[SPLIT] = state[SPLIT] + 1
            close_part(metadata, state, place, state[_BLOCK], 1)
        else:
            close_part(metadata, state, place - 1, previous_end, 0)
        state[_PART] = state[_PART] + 1
        state[_BEGIN_PLACE] = place
        state[_BEGIN_BLOCK] = state[_BLOCK]
        state[_BEGIN_SPLIT] = state[SPLIT]
        state[_REMAINING] = payload
    state[_REMAINING] = state[_REMAINING] - (end - state[_BLOCK] + overhead)


@T.macro
def resume_walk(state, marks, segment, plan, payload, overhead, opened_end) -> None:
    """Go on at the first place of a segment, from what was marked there when the plan was played (`plans`)."""
    # The open part's first request has used it up to what was left then.
    in_part = payload - overhead - marks[OPENED_LEFT, segment, plan]
    state[_BEGIN_PLACE] = marks[OPENED_BY, segment, plan]
    state[_BEGIN_BLOCK] = opened_end - in_part
    state[_BEGIN_SPLIT] = marks[OPENED_SPLIT, segment, plan]
    state[_PART] = marks[PARTS, segment, plan] - 1
    state[_REMAINING] = marks[LEFT, segment, plan]

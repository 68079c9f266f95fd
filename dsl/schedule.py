"""The tile schedule: its layout, and how a kernel reads it.

The functions here are plain Python over TIR expressions, so that every target's program says the same thing. A schedule
is ``tile_scheduler_metadata``, (num_sm_parts, 8) int32, one row per part, and ``num_splits``, (b + 1,) int32, the
exclusive prefix sum of the number of splits per request. A part is a run of consecutive blocks of the requests that
follow each other in the walk; a request whose blocks fall into more than one part is split, and each of its pieces has
a slot in the partial buffers: ``num_splits[request] + index of the piece``.

The walk visits *places*. Most schedules take the requests as they come, and a request is its own place. An ordered
schedule has chosen an order, in which few requests are split: its places count from `ORDERED` on, and column `ORDER`
of the rows, four to a row, says which request is at each. A row that somebody else wrote is never taken for that.
"""

from typing import Any, NamedTuple

import tilelang.language as T

from tilemla.spec import ORDERED

# Columns of tile_scheduler_metadata.
BEGIN_PLACE = 0
END_PLACE_INCLUSIVE = 1
BEGIN_BLOCK = 2
END_BLOCK = 3  # exclusive, in the last request
BEGIN_SPLIT = 4
IS_FIRST_REQUEST_SPLIT = 5
IS_LAST_REQUEST_SPLIT = 6
ORDER = 7  # a byte for each of four places, from the lowest on; 0 in a schedule that has no order
NUM_COLUMNS = 8

PLACES_PER_ROW = 4
MOST_ORDERED = 256  # requests: what a byte can tell apart


# Tokens in a scheduling block, whatever the page size: callers of the tuple form copy schedules between kernels.
BLOCK_N = 64


class Part(NamedTuple):
    """One row of tile_scheduler_metadata, without the order, as int32 expressions."""

    begin_place: Any
    end_place_inclusive: Any
    begin_block: Any
    end_block: Any
    begin_split: Any
    is_first_request_split: Any
    is_last_request_split: Any


def read_part(tile_scheduler_metadata, part) -> Any:
    """Row `part` of the schedule; an idle part has no place between its begin and its end."""
    return Part(*(tile_scheduler_metadata[part, column] for column in range(len(Part._fields))))


@T.macro
def write_part(tile_scheduler_metadata, part, row) -> None:
    """Write row `part` of the schedule but for its share of the order."""
    tile_scheduler_metadata[part, BEGIN_PLACE] = row.begin_place
    tile_scheduler_metadata[part, END_PLACE_INCLUSIVE] = row.end_place_inclusive
    tile_scheduler_metadata[part, BEGIN_BLOCK] = row.begin_block
    tile_scheduler_metadata[part, END_BLOCK] = row.end_block
    tile_scheduler_metadata[part, BEGIN_SPLIT] = row.begin_split
    tile_scheduler_metadata[part, IS_FIRST_REQUEST_SPLIT] = row.is_first_request_split
    tile_scheduler_metadata[part, IS_LAST_REQUEST_SPLIT] = row.is_last_request_split


@T.macro
def write_order(tile_scheduler_metadata, part, requests) -> None:
    """Write the share of row `part` in the order: `requests` at four places, a byte each."""
    tile_scheduler_metadata[part, ORDER] = requests


def idle_row(batch_size) -> Part:
    """The row of a part without work."""
    return Part(batch_size, batch_size - 1, 0, 0, 0, 0, 0)


def request_at(tile_scheduler_metadata, place) -> Any:
    """The request at a place of the walk, int32."""
    four = tile_scheduler_metadata[T.shift_right(place - ORDERED, PLACES_PER_ROW.bit_length() - 1), ORDER]
    request = T.bitwise_and(T.shift_right(four, T.bitwise_and(place, PLACES_PER_ROW - 1) * 8), 255)
    return T.if_then_else(place < ORDERED, place, request)


def count_blocks(cache_seqlen, block_n) -> Any:
    """Blocks of `block_n` tokens that hold `cache_seqlen` tokens; none for a length of 0 or less."""
    return T.shift_right(T.max(cache_seqlen, 0) + (block_n - 1), block_n.bit_length() - 1)


def first_block(part, place) -> Any:
    """The first block within `part` of the request at `place`, int32."""
    return T.if_then_else(place == part.begin_place, part.begin_block, 0)


def end_block(part, place, cache_seqlen, block_n) -> Any:
    """One past the last block within `part` of the request at `place`, a sequence of `cache_seqlen` tokens, int32."""
    return T.if_then_else(place == part.end_place_inclusive, part.end_block, count_blocks(cache_seqlen, block_n))


def is_split(part, place) -> Any:
    """Whether other parts hold blocks of the request at `place` too: its result is then a partial one, bool."""
    return (
        T.if_then_else(
            place == part.begin_place,
            part.is_first_request_split,
            T.if_then_else(place == part.end_place_inclusive, part.is_last_request_split, 0),
        )
        != 0
    )


def split_slot(part, place, request, num_splits) -> Any:
    """The slot of the piece of `request`, which is at `place`, within `part` in out_accum and lse_accum_log2, int32.

    Only the first request of a part can have begun in an earlier one.
    """
    return num_splits[request] + T.if_then_else(place == part.begin_place, part.begin_split, 0)

"""The tile schedule: its layout, and how a kernel reads it.

The functions here are plain Python over TIR expressions, so that every target's program says the same thing. A schedule
is ``tile_scheduler_metadata``, (num_sm_parts, 8) int32, one row per part, and ``num_splits``, (b + 1,) int32, the
exclusive prefix sum of the number of splits per request. A part is a run of consecutive blocks of consecutive requests;
a request whose blocks fall into more than one part is split, and each of its pieces has a slot in the partial buffers:
``num_splits[request] + index of the piece``.
"""

from typing import Any, NamedTuple

import tilelang.language as T

# Columns of tile_scheduler_metadata.
BEGIN_REQUEST = 0
END_REQUEST_INCLUSIVE = 1
BEGIN_BLOCK = 2
END_BLOCK = 3  # exclusive, in the last request
BEGIN_SPLIT = 4
IS_FIRST_REQUEST_SPLIT = 5
IS_LAST_REQUEST_SPLIT = 6
RESERVED = 7  # 0
NUM_COLUMNS = 8


# Tokens in a scheduling block, whatever the page size: callers of the tuple form copy schedules between kernels.
BLOCK_N = 64


class Part(NamedTuple):
    """One row of tile_scheduler_metadata as int32 expressions."""

    begin_request: Any
    end_request_inclusive: Any
    begin_block: Any
    end_block: Any
    begin_split: Any
    is_first_request_split: Any
    is_last_request_split: Any


def read_part(tile_scheduler_metadata, part) -> Any:
    """Row `part` of the schedule; an idle part has no request between its begin and its end."""
    return Part(*(tile_scheduler_metadata[part, column] for column in range(len(Part._fields))))


@T.macro
def write_part(tile_scheduler_metadata, part, row) -> None:
    """Write row `part` of the schedule."""
    tile_scheduler_metadata[part, BEGIN_REQUEST] = row.begin_request
    tile_scheduler_metadata[part, END_REQUEST_INCLUSIVE] = row.end_request_inclusive
    tile_scheduler_metadata[part, BEGIN_BLOCK] = row.begin_block
    tile_scheduler_metadata[part, END_BLOCK] = row.end_block
    tile_scheduler_metadata[part, BEGIN_SPLIT] = row.begin_split
    tile_scheduler_metadata[part, IS_FIRST_REQUEST_SPLIT] = row.is_first_request_split
    tile_scheduler_metadata[part, IS_LAST_REQUEST_SPLIT] = row.is_last_request_split
    tile_scheduler_metadata[part, RESERVED] = 0


def idle_row(batch_size) -> Part:
    """The row of a part without work."""
    return Part(batch_size, batch_size - 1, 0, 0, 0, 0, 0)


def count_blocks(cache_seqlen, block_n) -> Any:
    """Blocks of `block_n` tokens that hold `cache_seqlen` tokens; none for a length of 0 or less."""
    return T.shift_right(T.max(cache_seqlen, 0) + (block_n - 1), block_n.bit_length() - 1)


def first_block(part, request) -> Any:
    """The first block of `request` within `part`, int32."""
    return T.if_then_else(request == part.begin_request, part.begin_block, 0)


def end_block(part, request, cache_seqlen, block_n) -> Any:
    """One past the last block of `request`, a sequence of `cache_seqlen` tokens, within `part`, int32."""
    return T.if_then_else(request == part.end_request_inclusive, part.end_block, count_blocks(cache_seqlen, block_n))


def is_split(part, request) -> Any:
    """Whether other parts hold blocks of `request` too: its result is then a partial one, bool."""
    return (
        T.if_then_else(
            request == part.begin_request,
            part.is_first_request_split,
            T.if_then_else(request == part.end_request_inclusive, part.is_last_request_split, 0),
        )
        != 0
    )


def split_slot(part, request, num_splits) -> Any:
    """The slot of the piece of `request` within `part` in out_accum and lse_accum_log2, int32.

    Only the first request of a part can have begun in an earlier one.
    """
    return num_splits[request] + T.if_then_else(request == part.begin_request, part.begin_split, 0)

"""What a schedule is made with: the costs that the scheduler weighs, as a pure function of the call.

Standard library only.
"""

from __future__ import annotations

from typing import NamedTuple

# Rows of the query tile that the constants below were measured with.
_TILE_ROWS = 64


class ScheduleCosts(NamedTuple):
    """Costs of a schedule, in a part's time for a block of 64 tokens, or in eighths of that.

    Parameters
    ----------
    overhead : int
        What visiting a request costs beside its blocks (query load, pipeline fill, epilogue), in blocks.
    combine_eighths : int
        What it costs to cut any request at all (partial results written, read and merged), in eighths of a block.
    piece_eighths : int
        What each piece of the request that is cut most costs more, in eighths of a block.
    """

    overhead: int
    combine_eighths: int
    piece_eighths: int


def select_schedule_costs(rows: int) -> ScheduleCosts:
    """Choose the costs for a call.

    Parameters
    ----------
    rows : int
        Rows of queries that share a KV head, ``seq_len_q * num_heads_q // num_heads_k``, 1 or more.

    Returns
    -------
    ScheduleCosts
        Constants measured on an H100, and what a full tile of 64 rows adds to each.
    """
    used = min(rows, _TILE_ROWS)
    return ScheduleCosts(
        overhead=1 + 4 * used // _TILE_ROWS,
        combine_eighths=8 * (2 + 6 * used // _TILE_ROWS),
        piece_eighths=1 + used // _TILE_ROWS,
    )

"""What a schedule is made with: the costs that the scheduler weighs, as a pure function of the call.

Standard library only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from tilemla.spec import NARROW_ROWS

# Blocks of 64 tokens between two cuts of a request in a batch-invariant call: many enough that merging costs little,
# few enough that a long request is spread over the GPU. A change of it changes the bits of results.
BATCH_INVARIANT_BLOCKS = 32

# Rows of the query tile that costs are measured with, and multiprocessors of the GPU.
_TILE_ROWS = 64
_H100_SMS = 132
# The scheduler tries 16 payloads, from the equal share on, and one that is an overhead larger always works. Up to the
# others its sums stay below what it takes for "never".
_MOST_OVERHEAD, _MOST_COMBINE_EIGHTHS, _MOST_PIECE_64THS, _MOST_CROWDED_EIGHTHS = 15, 1023, 96, 1023


class ScheduleCosts(NamedTuple):
    """Costs of a schedule, in a part's time for a block of 64 tokens, or in eighths or 64ths of that.

    Parameters
    ----------
    overhead : int
        What visiting a request costs beside its blocks (query load, pipeline fill, epilogue), in blocks.
    combine_eighths : int
        What it costs to cut any request at all (partial results written, read and merged), in eighths of a block.
    piece_64ths : int
        What each piece of the request that is cut most costs more, in 64ths of a block; beyond 64 pieces it grows with
        their number.
    crowded_eighths : int
        What cutting costs more where more than half of the parts are in use, in eighths of a block: the combine kernel
        then finds few multiprocessors free until parts end.
    """

    overhead: int
    combine_eighths: int
    piece_64ths: int
    crowded_eighths: int

    def why_invalid(self) -> str | None:
        """The one validity predicate: None when a schedule can be made so, else why not, with the received value."""
        limits = (_MOST_OVERHEAD, _MOST_COMBINE_EIGHTHS, _MOST_PIECE_64THS, _MOST_CROWDED_EIGHTHS)
        for name, value, most in zip(self._fields, self, limits, strict=True):
            if not 0 <= value <= most:
                return f"{name} must be 0 to {most}, got {value}"
        return None

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ScheduleCosts:
        """Make costs of what ``_asdict`` gave.

        Raises
        ------
        ValueError
            On a field that is missing, unknown or no integer.
        """
        if sorted(fields) != sorted(cls._fields):
            raise ValueError(f"costs must have the fields {', '.join(cls._fields)}, got {', '.join(fields) or 'none'}")
        for name, value in fields.items():
            if type(value) is not int:
                raise ValueError(f"costs field {name} must be int, got {value!r}")
        return cls(**fields)


def _tiles_to_merge(rows: int, batch_size: int, num_sm_parts: int) -> float:
    """Tiles of 64 rows that all requests have together: what the combine kernel reads of each piece, by its rows.

    The fewer parts a schedule has, the more KV heads, queries and tiles share the GPU with each.
    """
    return _H100_SMS * batch_size / num_sm_parts * min(rows, _TILE_ROWS) / _TILE_ROWS


def formula_costs(rows: int, batch_size: int, num_sm_parts: int) -> ScheduleCosts:
    """Costs where none were chosen by measurement.

    Parameters
    ----------
    rows : int
        Rows of queries that share a KV head, ``seq_len_q * num_heads_q // num_heads_k``, 1 or more.
    batch_size : int
        Requests, 1 or more.
    num_sm_parts : int
        Parts of the schedule.

    Returns
    -------
    ScheduleCosts
        By times of some 150 shapes, each cut in several ways, on an H200: an overhead that grows with the rows of a
        tile, a cost of each piece that grows with the tiles of all requests, and constants.
    """
    used = min(rows, _TILE_ROWS)
    tiles = _tiles_to_merge(rows, batch_size, num_sm_parts)
    return ScheduleCosts(
        overhead=1 + 4 * used // _TILE_ROWS,
        combine_eighths=20,
        piece_64ths=min(int(tiles * 1.6 + 2.5), 32),
        crowded_eighths=9,
    )


# What a call attends to: pages of 16 bits an element, whose costs the tuner chooses, pages in FP8, tokens by index.
CALL_KINDS = ("dense", "fp8", "indexed")
# Where blocks take a part longer than those of a 16-bit cache, or shorter: overhead, cost of cutting, of a piece for
# each tile of 64 rows that is merged, and of a crowded GPU.
_MEASURED = {"fp8": (3, 40, 0.5, 9), "indexed": (2, 16, 1.25, 4)}


def costs_of_kind(kind: str, rows: int, batch_size: int, num_sm_parts: int) -> ScheduleCosts | None:
    """Costs of calls that the tuner does not know.

    A block of tokens named by index takes a part two to three times as long as a page, so that cutting costs fewer
    blocks.

    Parameters
    ----------
    kind : str
        Of ``CALL_KINDS``.
    rows : int
        Rows of queries that share the tokens of a part: those of a KV head, or heads of a query; 1 or more.
    batch_size : int
        Requests, 1 or more.
    num_sm_parts : int
        Parts of the schedule.

    Returns
    -------
    ScheduleCosts or None
        Measured on an H100, what a piece costs on an H200; None where `select_schedule_costs` is as good.
    """
    if kind not in _MEASURED or (kind == "fp8" and rows <= NARROW_ROWS):
        return None
    overhead, combine_eighths, of_tile, crowded_eighths = _MEASURED[kind]
    tiles = _tiles_to_merge(rows, batch_size, num_sm_parts)
    return ScheduleCosts(overhead, combine_eighths, min(int(tiles * of_tile + 0.5), 32), crowded_eighths)


# The work of a part on a block, and with it what everything else costs in blocks, is set by how full the tile of 64
# rows is, and by whether several tiles share a stream of KV.
_ROWS_CLASSES = {"part_tile": _TILE_ROWS // 2, "full_tile": _TILE_ROWS, "many_tiles": None}
# How deep requests are cut is set by the parts that there are for each, of which these are the least numbers. With
# many, merging is what is to be weighed, and the more requests share the GPU the dearer it is; with hardly one,
# whether to cut at all.
_DEPTH_CLASSES = {"alone": 48, "deep": 8, "some": 2, "whole": 0}
SHAPE_CLASSES = tuple(f"{rows}/{depth}" for rows, depth in itertools.product(_ROWS_CLASSES, _DEPTH_CLASSES))


def shape_class(rows: int, batch_size: int, num_sm_parts: int) -> str:
    """The class of calls that share costs: what ``get_mla_metadata`` knows in its tuple form, and no lengths.

    Parameters
    ----------
    rows : int
        Rows of queries that share a KV head.
    batch_size : int
        Requests, 1 or more.
    num_sm_parts : int
        Parts of the schedule.

    Returns
    -------
    str
        One of ``SHAPE_CLASSES``, such as ``"part_tile/deep"``.
    """
    filled = next(name for name, most in _ROWS_CLASSES.items() if most is None or rows <= most)
    depth = next(name for name, least in _DEPTH_CLASSES.items() if num_sm_parts >= least * batch_size)
    return f"{filled}/{depth}"


def select_schedule_costs(
    rows: int, batch_size: int, num_sm_parts: int, chosen: Mapping[str, ScheduleCosts]
) -> ScheduleCosts:
    """Choose the costs for a call.

    Parameters
    ----------
    rows, batch_size, num_sm_parts : int
        As of ``shape_class``.
    chosen : mapping of str to ScheduleCosts
        What measurement chose, by class of shapes.

    Returns
    -------
    ScheduleCosts
        Those of the call's class, by the formula where there are none.
    """
    costs = chosen.get(shape_class(rows, batch_size, num_sm_parts))
    return formula_costs(rows, batch_size, num_sm_parts) if costs is None else costs

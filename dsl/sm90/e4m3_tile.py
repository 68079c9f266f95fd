"""Sizes of the decode kernel over e4m3: its tile, the ring of pages and that of P.

An item of the ring is 64 rows of 576 bytes, the Q tile of a request or one of its pages: 512 latent columns in atoms of
128, and the rope columns in a narrower one. Every warpgroup counts the items; an item's number tells its stage, and the
slot of P, which a Q tile has as well, though it stays empty.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.sm90.tile import ROWS, phase_of_item, place_of_item

ATOM_COLUMNS = 128  # of one 128-byte swizzle atom
ATOM_BYTES = ROWS * ATOM_COLUMNS
ROPE_COLUMNS = 64
CHUNK = 16  # bytes of a row that swizzling and ldmatrix move as one

# Powers of two.
NUM_STAGES = 4
NUM_SLOTS = 2
# The score and the output warps are done with an item.
EMPTY_ARRIVALS = 12

K_STEP = 32  # the K of wgmma on e4m3
# The last latent K steps of Q stay in shared memory: a score warpgroup has no registers for them.
SHARED_STEPS = 4
TAIL_ATOMS = -(-SHARED_STEPS * K_STEP // ATOM_COLUMNS)
A_REGISTERS = 4  # 32-bit registers of an operand of 64 rows and a K step that a thread holds
SCORE_REGISTERS, OUTPUT_REGISTERS = 144, 176


def with_fields(t: SimpleNamespace, **fields: Any) -> SimpleNamespace:
    """The same names with others in the place of some."""
    return SimpleNamespace(**{**vars(t), **fields})


def stage_of(item) -> Any:
    """The stage of an item, int32."""
    return place_of_item(item, NUM_STAGES)


def phase_of(item) -> Any:
    """The parity to wait for on the barriers of an item's stage, int32."""
    return phase_of_item(item, NUM_STAGES)


def slot_of(item) -> Any:
    """The slot of an item's P, int32."""
    return place_of_item(item, NUM_SLOTS)


def slot_phase_of(item) -> Any:
    """The parity to wait for on the barriers of an item's slot, int32."""
    return phase_of_item(item, NUM_SLOTS)


@T.macro
def arrive_elected(barriers, index) -> None:
    """One arrival for a warp, as `arrive_warp`, by a lane that no register tells."""
    if T.shuffle_elect(32):
        T.barrier_arrive(barriers[index])

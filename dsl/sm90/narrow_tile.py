"""Sizes of the decode kernel for few rows over a cache of bytes: its tile, the ring of pages, and how they are shared.

An item of the ring is a page as it lies in memory, 64 tokens of 656 bytes: rows apart by an odd number of 16-byte
chunks lie in different banks, so that nothing needs swizzling. The warpgroups take items in turn, each of its own
stages; an item's number, counted over all requests of a part, tells its warpgroup and its stage.
"""

from typing import Any

from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.tile import phase_of_item, place_of_item
from tilemla.spec import NARROW_ROWS

ROWS = NARROW_ROWS  # of a query tile: the N of wgmma
CHUNK = 16  # bytes that ldmatrix and bulk copies move as one
PIECE_COLUMNS = 128  # latent columns of one scale
NUM_PIECES = 4
PITCH = 656  # bytes of a token: latent columns, scales, rope columns
SCALES_AT, ROPE_AT = 512, 528
PAGE_BYTES = BLOCK_N * PITCH
TOKENS_PER_COPY = 8  # where they follow each other: of 41 times 128 bytes

# Powers of two.
NUM_WARPGROUPS = 2
NUM_STAGES = 4

# Of Q and P, atoms of 128 bytes a row, 16 rows.
ATOM_COLUMNS = 64
ROW_BYTES = ATOM_COLUMNS * 2
ATOM_BYTES = ROWS * ROW_BYTES
K_STEP = 16
A_REGISTERS = 4  # 32-bit registers of an m64k16 operand that a thread holds
SCORES = 8  # elements of a 64x16 accumulator that a thread holds
COLUMNS = 4  # rows of the tile, columns of an accumulator, that a thread has elements of
NUM_TILES = 8  # of 64 output columns

CONSUMERS = NUM_WARPGROUPS * 128
NUM_THREADS = CONSUMERS + 128  # and a warpgroup of which a warp loads: the others leave their registers to the rest
CONSUMER_REGISTERS, LOAD_REGISTERS = 224, 56
MERGE_BARRIER = 3  # 1 and 2 are those of the warpgroups
# What a warpgroup has of shared memory for itself: P, twice, or at the end of a request half of its outputs.
OWN_FLOATS = NUM_TILES // 2 * SCORES * 128


def stage_of(item) -> Any:
    """The stage of an item, int32."""
    return place_of_item(item, NUM_STAGES)


def phase_of(item) -> Any:
    """The parity to wait for on the barriers of an item's stage, int32."""
    return phase_of_item(item, NUM_STAGES)

"""Sizes of the sparse kernels' tile, the ring of their stages, and a request's blocks.

Three warpgroups, of which two take turns at the scores (`alternate`) and a producer gathers the tokens of a block one
by one. Or four: scores, left half of the output, right half, and a producer. Q stays where it is for a whole request,
in a stage of its own; two more are a ring of blocks.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.schedule import BLOCK_N, count_blocks, first_block
from tilemla.dsl.sm90.tile import ATOM_BYTES, HALF, K_STEP, SLICE, STAGE_COLUMNS, WARPGROUP, arrive_warp, request_of

NUM_STAGES = 2
Q_STAGE = NUM_STAGES
NUM_THREADS = 4 * WARPGROUP
# Of a thread of the score warpgroup, of each output warpgroup and of the producer.
SCORE_REGISTERS, OUTPUT_REGISTERS, PRODUCER_REGISTERS = 96, 160, 96
# K steps of Q that the score warpgroup holds in registers, four each: every one spares reading Q's columns from shared
# memory again for each block.
Q_STEPS = 2
QUARTER = HALF // 2  # output columns of an accumulator, of which an output warpgroup has two

# A block comes in pieces, the last one with the rope part: each has a barrier, so that the scores start when the first
# one is there. An output warpgroup frees the piece of its first accumulator before that of the second; the last piece
# holds P, too, which both read.
PIECES = (0, 128, 256, 384)  # their first columns
NUM_PIECES = len(PIECES)

OPERANDS = {"bfloat16": "bf16", "float16": "fp16"}  # of a dtype in wgmma's instructions
STAGE_BYTES = STAGE_COLUMNS // SLICE * ATOM_BYTES

WARP = 32
NUM_WARPS = WARPGROUP // WARP  # of the producer

# Warps at the barriers of pieces: those of the producer, and those of who frees a piece.
FULL_ARRIVALS = [NUM_WARPS] * NUM_PIECES * NUM_STAGES
EMPTY_ARRIVALS = ([NUM_WARPS] * (NUM_PIECES - 1) + [2 * NUM_WARPS]) * NUM_STAGES

# Thread blocks of a cluster, which have neighbouring tiles of the same heads and so the same tokens: each converts half
# of a block and stores it to both. Otherwise a thread block is alone.
ALONE, PAIR = 1, 2


def k_step_offset(k_step, stage) -> Any:
    """Of a K step of Q or of a stage, in the 16-byte units of a wgmma descriptor."""
    steps = SLICE // K_STEP
    within = k_step // steps * ATOM_BYTES + k_step % steps * K_STEP * 2
    return stage * (STAGE_BYTES >> 4) + (within >> 4)


def tokens_of_warp(blocks: int) -> int:
    """Tokens of a block that a warp of the producer gathers, where that many thread blocks do; its word of the mask."""
    return BLOCK_N // NUM_WARPS // blocks


# Alternating warpgroups, of which each makes the scores of the blocks in its own stage and has half of the output
# columns, take five pieces: quarters of V, and what is behind them, the rope part and then P. The quarters of its own
# columns are free when a warpgroup has multiplied with its P, the others once the other one has, with P from there.
TURN_PIECES = len(PIECES) + 1
# Registers of a thread of those that take turns, and of the producer: 504 in all, what 384 threads start with.
TURN_REGISTERS, PAIRED_TURN_REGISTERS = (216, 216, 72), (216, 208, 80)
NUM_TURN_THREADS = 3 * WARPGROUP


def arrivals_of_turns(blocks: int) -> tuple[list[int], list[int]]:
    """At the barriers of full halves and of empty pieces, where that many thread blocks gather a block together.

    Halves are of the output columns: that of the warpgroup that makes the scores comes first, the other one together
    with the last piece. Alone, the asynchronous copies of each thread arrive, and with the last piece each warp of the
    producer, whose word of the mask is there, too. In a pair each warp arrives for what the other thread block stores,
    which counts by its bytes.
    """
    if blocks == ALONE:
        full = [WARPGROUP, WARPGROUP + NUM_WARPS, WARPGROUP + NUM_WARPS, WARPGROUP]
    else:
        full = [NUM_WARPS] * 2 * NUM_STAGES
    return full, [NUM_WARPS * blocks] * TURN_PIECES * NUM_STAGES


def full_of_half(stage, half) -> Any:
    """Which of the barriers says that a half is there, in a stage of alternating warpgroups."""
    return stage * 2 + half


@T.macro
def load_q(place, head_dim_qk, t) -> None:
    """Load the Q of the request at a place into its stage, by the first warp of the warpgroup that this is."""
    if t.tx % WARPGROUP < WARP:
        request = request_of(place, t)
        T.tma_copy(
            t.q_tile(request, t),
            t.kv[Q_STAGE, :, 0:head_dim_qk],
            barrier=t.q_full[0],
            leader_scope_threads=WARP,
        )
        arrive_warp(t.q_full, 0, t.tx)


def blocks_of_place(place, request, t) -> Any:
    """Blocks within the part of a request at a place, int32: the first, one past the last, how many of its own list.

    Those of the extra list follow, and no block holds tokens of both. With them the lengths of the lists.
    """
    length = T.min(t.topk_length[request], t.topk)
    extra_length = T.min(t.extra_topk_length[request], t.extra_topk)
    main = count_blocks(length, BLOCK_N)
    extra = count_blocks(extra_length, BLOCK_N)
    return SimpleNamespace(
        begin=first_block(t.part, place),
        end=T.if_then_else(place == t.part.end_place_inclusive, t.part.end_block, main + extra),
        main=main,
        length=length,
        extra_length=extra_length,
    )

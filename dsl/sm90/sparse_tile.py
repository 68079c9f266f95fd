"""Sizes of the sparse kernels' tile, the ring of their stages, and a request's blocks.

Four warpgroups: scores, left half of the output, right half, and a producer that gathers the tokens of a block one by
one. Or three, of which two take turns at the scores (`alternate`). Q stays where it is for a whole request, in a stage
of its own; two more are a ring of blocks.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.schedule import BLOCK_N, count_blocks, first_block
from tilemla.dsl.sm90.tile import ATOM_BYTES, HALF, K_STEP, SLICE, STAGE_COLUMNS, WARPGROUP, arrive_warp, request_of

NUM_STAGES = 2
Q_STAGE = NUM_STAGES
NUM_THREADS = 4 * WARPGROUP
OUTPUT_REGISTERS = 160
QUARTER = HALF // 2  # output columns of an accumulator, of which an output warpgroup has two

# A block comes in pieces, the last one with the rope part: each has a barrier, so that the scores start when the first
# one is there.
PIECES = (0, 128, 256, 384)  # their first columns
NUM_PIECES = len(PIECES)
# The quarters of the output are freed one by one: by each output warpgroup the one of its first accumulator before that
# of the second. The last piece holds P, too, which both read.
PIECES_AS_FREED = (0, 2, 1, 3)

OPERANDS = {"bfloat16": "bf16", "float16": "fp16"}  # of a dtype in wgmma's instructions
STAGE_BYTES = STAGE_COLUMNS // SLICE * ATOM_BYTES

WARP = 32
NUM_WARPS = WARPGROUP // WARP  # of the producer

# Warps at the barriers of what an output warpgroup frees, a piece at a time.
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


@dataclasses.dataclass(frozen=True)
class Roles:
    """How the registers of the SM are shared, 512 among a thread of each warpgroup.

    Parameters
    ----------
    score_registers, producer_registers : int
        Of a thread; each output warpgroup has 160.
    q_steps : int
        K steps of Q that the score warpgroup holds in registers, four each: every one spares reading Q's columns from
        shared memory again for each block.
    copies_arrive : bool
        Whether the producer's asynchronous copies arrive at the barrier of a piece, each thread's. Otherwise its warps
        do, when what they stored is there for wgmma.
    """

    score_registers: int
    producer_registers: int
    q_steps: int
    copies_arrive: bool

    @property
    def full_arrivals(self) -> list[int]:
        """At the barriers of the ring's pieces; with the last piece every warp's word of the mask arrives."""
        if self.copies_arrive:
            return ([WARPGROUP] * (NUM_PIECES - 1) + [WARPGROUP + NUM_WARPS]) * NUM_STAGES
        return [NUM_WARPS] * NUM_PIECES * NUM_STAGES


# Alternating warpgroups, of which each makes the scores of the blocks in its own stage and has half of the output
# columns, take five pieces: quarters of V, and what is behind them, the rope part and then P. The quarters of its own
# columns are free when a warpgroup has multiplied with its P, the others once the other one has, with P from there.
TURN_PIECES = len(PIECES) + 1
# Registers of a thread of those that take turns, and of the producer: 504 in all, what 384 threads start with.
TURN_REGISTERS, PAIRED_TURN_REGISTERS = (216, 216, 72), (216, 208, 80)
NUM_TURN_THREADS = 3 * WARPGROUP


def arrivals_of_turns(blocks: int = ALONE) -> tuple[list[int], list[int]]:
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


def roles_of(kv_format: str) -> Roles:
    """The roles for a cache's format."""
    if kv_format == "dense":
        return Roles(score_registers=152, producer_registers=40, q_steps=16, copies_arrive=True)
    return Roles(score_registers=96, producer_registers=96, q_steps=2, copies_arrive=False)


def columns_of_pieces(head_dim_qk: int, roles: Roles) -> list[tuple[int, int, int]]:
    """The pieces of a block as they come: number, first column and columns."""
    ends = (*PIECES[1:], head_dim_qk)
    order = PIECES_AS_FREED if roles.copies_arrive else range(NUM_PIECES)
    return [(i, PIECES[i], ends[i] - PIECES[i]) for i in order]


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

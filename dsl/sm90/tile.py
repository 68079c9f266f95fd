"""Sizes of the decode kernel's tile, and the ring that its warpgroups share.

An *item* is what one stage of the ring holds: the Q tile of a request, then its pages, then the Q tile of the next
request. Every warpgroup walks the same items in the same order, so a counter of its own tells it stage and phase.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import first_visible_block
from tilemla.dsl.schedule import BLOCK_N, end_block, first_block, request_at

ROWS = 64  # rows of a query tile: the M of wgmma
K_STEP = 16  # the K of wgmma on 16-bit operands
SLICE = 64  # columns of one 128-byte swizzle atom
ATOM_BYTES = ROWS * SLICE * 2
HALF = 256  # output columns of one output warpgroup
# Columns of a stage: a page's latent ones and 64 more, for the rope part where there is one, and then for P.
STAGE_COLUMNS = 2 * HALF + SLICE

NUM_STAGES = 3
NUM_THIRDS = 3  # a stage is loaded under three barriers: the scores start when the first third of a page is there

# Q is 36 K steps wide. A score warpgroup holds 31 in registers (124 of a thread's 184); the rest stay in shared memory,
# which is full with them: 231,424 bytes and what is static.
Q_STEPS_IN_REGISTERS = 31
A_REGISTERS = 4  # 32-bit registers of an m64k16 operand that a thread holds
SCORES = 32  # elements of a 64x64 accumulator that a thread holds

# Three warpgroups: scores, left half of the output, right half. Registers a thread sum to what 384 threads start with;
# 160 is the least that holds a 64x256 accumulator.
WARPGROUP = 128
NUM_THREADS = 3 * WARPGROUP
# The first warp of the right output warpgroup issues the loads.
LOAD_WARP_BEGIN = 2 * WARPGROUP
LOAD_WARP_END = LOAD_WARP_BEGIN + 32
SCORE_REGISTERS, OUTPUT_REGISTERS = 184, 160
SCORE_BARRIER, LEFT_BARRIER, RIGHT_BARRIER = 1, 2, 3  # named barriers of a warpgroup; 0 is __syncthreads

# Annotations of a loop that nvcc would unroll, though it is long or rarely run: what is not in the way costs nothing.
NOT_UNROLLED = {"pragma_unroll_factor": 1}


def stage_of(turn, num_stages=NUM_STAGES) -> Any:
    """The stage of the item at `turn`; a turn is stage + num_stages * phase, int32."""
    return T.if_then_else(turn >= num_stages, turn - num_stages, turn)


def phase_of(turn, num_stages=NUM_STAGES) -> Any:
    """The parity to wait for on the barriers of the item at `turn`, int32."""
    return T.if_then_else(turn >= num_stages, 1, 0)


def next_turn(turn, num_stages=NUM_STAGES) -> Any:
    """The turn of the next item."""
    return T.if_then_else(turn == 2 * num_stages - 1, 0, turn + 1)


def columns_of_thirds(head_dim_qk: int) -> list[tuple[int, int, int]]:
    """The thirds of an item: number, first column and columns, whole swizzle atoms each."""
    width = -(-head_dim_qk // SLICE // NUM_THIRDS) * SLICE
    return [(i, i * width, min(width, head_dim_qk - i * width)) for i in range(NUM_THIRDS)]


def half_of(tx) -> Any:
    """Which half of an accumulator's columns an output warpgroup has, int32; they follow the score warpgroup."""
    return tx // WARPGROUP - 1


def barrier_of_half(tx) -> Any:
    """The named barrier of an output warpgroup, int32."""
    return half_of(tx) + LEFT_BARRIER


def row_of(tx) -> Any:
    """The first row of a tile that a thread holds elements of in wgmma's accumulators, int32; the other is 8 below."""
    return tx % WARPGROUP // 32 * 16 + tx % 32 // 4


def is_loading(tx) -> Any:
    """Whether a thread is of the warp that issues the loads."""
    return (tx >= LOAD_WARP_BEGIN) & (tx < LOAD_WARP_END)


def place_of_item(item, count) -> Any:
    """The place of an item in a ring of `count`, a power of two, whose items are numbered, int32."""
    return T.bitwise_and(item, count - 1)


def phase_of_item(item, count) -> Any:
    """The parity to wait for on the barriers of an item's place in such a ring, int32."""
    return T.bitwise_and(T.shift_right(item, count.bit_length() - 1), 1)


def request_of(place, t) -> Any:
    """The request at a place of the walk, int32; its own place where the kernel takes no order, ``t.order`` None."""
    return place if t.order is None else request_at(t.order, place)


def begin_and_end(place, request, t) -> Any:
    """The first block within the part that some query of the request at a place sees, and one past the last, int32."""
    seqlen = t.cache_seqlens[request]
    visible = first_visible_block(seqlen, t.seq_len_q, t.window_left, BLOCK_N)
    return SimpleNamespace(
        begin=T.max(first_block(t.part, place), visible), end=end_block(t.part, place, seqlen, BLOCK_N)
    )


@T.macro
def arrive_warp(barriers, index, tx) -> None:
    """One arrival for a warp; the caller has synchronised it with what its other threads did before."""
    if tx % 32 == 0:
        T.barrier_arrive(barriers[index])


@T.macro
def sync_half(tx) -> None:
    """Synchronise an output warpgroup, by itself."""
    T.sync_threads(barrier_of_half(tx), WARPGROUP)


@T.macro
def assume_stage(stage, num_stages=NUM_STAGES) -> None:
    """Tell the compiler the range of a stage: its arithmetic on addresses then needs no division."""
    T.assume(stage >= 0)
    T.assume(stage < num_stages)

"""The producer warpgroup: gather the tokens of a block by index, one by one, into a stage.

Each of its four warps has 16 tokens of a block, or 8 where two thread blocks gather it together. Their indices are read
by its lanes two blocks ahead and become addresses one block ahead, so that nobody waits for the list.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.sparse_tile import (
    ALONE,
    NUM_STAGES,
    QUARTER,
    TURN_PIECES,
    WARP,
    full_of_half,
    tokens_of_warp,
)
from tilemla.dsl.sm90.tile import (
    ATOM_BYTES,
    HALF,
    SLICE,
    STAGE_COLUMNS,
    WARPGROUP,
    arrive_warp,
    next_turn,
    phase_of,
    request_of,
    stage_of,
)

CHUNK = 8  # elements of 16 bytes
CHUNK_BYTES = 16
ROW_BYTES = 128  # of an atom
STAGE_ATOMS = STAGE_COLUMNS // SLICE
TOKENS_PER_PASS = WARP // CHUNK  # that a warp copies 128 bytes of at once, and whose rows a swizzle tells apart

# Where the producer is in the walk, two blocks ahead of the one it gathers: a local int32 buffer. REQUEST is the one at
# PLACE, where the kernel takes an order. Of it: the block, one past the last, the blocks of the main list, and how many
# indices each list has. AHEAD are the blocks whose indices have been read and that are not gathered yet.
PLACE, REQUEST, BLOCK, END, MAIN, LENGTH, EXTRA_LENGTH, AHEAD = range(8)
CURSOR_SIZE = 8

_PASSES = tuple(range(tokens_of_warp(ALONE) // TOKENS_PER_PASS))  # of a block's copies


def chunk_place(stage, first_row, row, chunk, kv) -> Any:
    """Address of a chunk of a row of the first atom of a stage; `first_row` is a multiple of 8, `kv` that of stages."""
    within = row * ROW_BYTES + T.bitwise_xor(chunk, row % 8) * CHUNK_BYTES
    return kv + (stage * STAGE_ATOMS * ATOM_BYTES + first_row * ROW_BYTES + within)


def shared_address(buffer: Any, *indices: Any) -> Any:
    """Of an element in shared memory, as the 32 bits that its instructions take, int32: worth keeping."""
    return T.call_extern("int32", "tilemla::shared_address", T.address_of(buffer[indices]))


def first_row_of(blocks: int, t) -> Any:
    """The first of the rows of a stage that a producer's warp gathers, int32."""
    row = t.tx % WARPGROUP // WARP * tokens_of_warp(blocks)
    if blocks == ALONE:
        return row
    return T.call_extern("int32", "tilemla::rank_in_cluster") * (BLOCK_N // blocks) + row


def request_of_cursor(cursor, t) -> Any:
    """The request that the cursor is at, int32."""
    return cursor[PLACE] if t.order is None else cursor[REQUEST]


def make_walk(
    blocks_of: Any, read_index: Any, address: Any, blocks: int = ALONE, prefetch: Any = None
) -> SimpleNamespace:
    """Make the macros ``start`` and ``step`` of the walk over the blocks of all requests.

    Parameters
    ----------
    blocks_of : callable
        Of a request's place, itself and t: first block, end, blocks of the main list, and the lengths of both.
    read_index : macro
        ``(index, cursor, token, t)``: put the index of a token of the cursor's block into ``index[0]``, -1 when it is
        past its list's end, and into ``index[1]`` whether the list is the extra one.
    address : macro
        ``(place, index, t)``: put the address of ``index`` into ``place[0]``, 0 when it is invalid.
    blocks : int
        Thread blocks that gather a block's tokens together.
    prefetch : macro, optional
        ``(token, t)``: ask for the index of a token of the part's first block before its list's length is known.
    """
    tokens = tokens_of_warp(blocks)

    @T.macro
    def seek(cursor, t):
        # To the first block of the first request from cursor[PLACE] on that has one; past the last if none has.
        cursor[BLOCK] = 0
        cursor[END] = 0
        while (cursor[PLACE] <= t.part.end_place_inclusive) & (cursor[BLOCK] >= cursor[END]):
            if t.order is not None:
                cursor[REQUEST] = request_of(cursor[PLACE], t)
            bounds = blocks_of(cursor[PLACE], request_of_cursor(cursor, t), t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            if end > begin:
                cursor[BLOCK] = begin
                cursor[END] = end
                cursor[MAIN] = bounds.main
                cursor[LENGTH] = bounds.length
                cursor[EXTRA_LENGTH] = bounds.extra_length
            else:
                cursor[PLACE] += 1

    @T.macro
    def fetch(index, cursor, first_row, t):
        index[0] = -1
        index[1] = 0
        if cursor[PLACE] <= t.part.end_place_inclusive:
            read_index(index, cursor, first_row + t.tx % tokens, t)
            cursor[AHEAD] += 1
            cursor[BLOCK] += 1
            if cursor[BLOCK] >= cursor[END]:
                cursor[PLACE] += 1
                seek(cursor, t)

    @T.macro
    def start(place, index, cursor, first_row, t):
        cursor[PLACE] = t.part.begin_place
        cursor[AHEAD] = 0
        if prefetch is not None:
            prefetch(first_row + t.tx % tokens, t)
        seek(cursor, t)
        fetch(index, cursor, first_row, t)
        address(place, index, t)
        fetch(index, cursor, first_row, t)

    @T.macro
    def step(place, index, cursor, first_row, t):
        # The addresses of the next block, and the indices of the one after it.
        address(place, index, t)
        fetch(index, cursor, first_row, t)

    return SimpleNamespace(start=start, step=step)


@T.macro
def _copy_atoms(atoms, atom, stage, first_row, rows, kv, t) -> None:
    # Of a warp's tokens, asynchronously, 16 bytes at a time: eight lanes copy a row's 128 bytes of an atom, so that a
    # copy of a warp is of four rows.
    for k in _PASSES:
        T.call_extern(
            "handle",
            f"tilemla::gather_atoms<{atoms}>",
            chunk_place(stage, first_row, k * TOKENS_PER_PASS + t.tx % WARP // CHUNK, t.tx % CHUNK, kv),
            rows[k],
            atom,
            t.tx % CHUNK * CHUNK_BYTES,
        )


def make_turn_producer(head_dim_qk: int, walk: SimpleNamespace, blocks_of: Any) -> Any:
    """Make the macro ``producer(t)`` for alternating warpgroups and a cache of the queries' dtype.

    Parameters
    ----------
    head_dim_qk : int
        Columns of a token.
    walk : SimpleNamespace
        Of `make_walk`.
    blocks_of : callable
        Of a request's place, itself and t: first block, and one past the last.
    """
    atoms, first_behind = QUARTER // SLICE, 2 * HALF // SLICE
    atoms_behind = head_dim_qk // SLICE - first_behind

    @T.macro
    def copy_block(stage, turn, first_row, rows, kv, t):
        # The half first whose warpgroup makes the scores.
        for i in T.unroll(TURN_PIECES - 1):
            piece = T.alloc_var("int32", init=T.bitwise_xor(i, stage * 2))
            T.barrier_wait(t.empty[stage * TURN_PIECES + piece], phase_of(turn, NUM_STAGES) ^ 1)
            _copy_atoms(atoms, piece * atoms, stage, first_row, rows, kv, t)
            if i == 1:
                T.cp_async_barrier_noinc(t.full[full_of_half(stage, stage)])
        T.barrier_wait(t.empty[stage * TURN_PIECES + TURN_PIECES - 1], phase_of(turn, NUM_STAGES) ^ 1)
        if atoms_behind > 0:
            _copy_atoms(atoms_behind, first_behind, stage, first_row, rows, kv, t)
        T.cp_async_barrier_noinc(t.full[full_of_half(stage, 1 - stage)])

    @T.macro
    def producer(t):
        cursor = T.alloc_local((CURSOR_SIZE,), "int32")
        index = T.alloc_local((2,), "int32")
        place = T.alloc_local((1,), "int64")
        rows = T.alloc_local((len(_PASSES),), "int64")
        turn = T.alloc_var("int32", init=0)
        warp = t.tx % WARPGROUP // WARP
        kv = T.alloc_var("int32", init=shared_address(t.kv, 0, 0, 0))
        first_row = first_row_of(ALONE, t)
        walk.start(place, index, cursor, first_row, t)
        # Not on the blocks that are ahead, as other producers do: prefill takes 1% longer so.
        for visited in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            bounds = blocks_of(visited, request_of(visited, t), t)
            end = T.alloc_var("int32", init=bounds.end)
            for _block in T.serial(bounds.begin, end):
                stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
                for k in _PASSES:
                    rows[k] = T.call_extern(
                        "int64", "tilemla::shuffle", place[0], k * TOKENS_PER_PASS + t.tx % WARP // CHUNK
                    )
                valid = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::ballot", place[0] != 0))
                copy_block(stage, turn, first_row, rows, kv, t)
                if t.tx % WARP == 0:
                    t.valid[stage, warp] = T.bitwise_and(valid, 2 ** tokens_of_warp(ALONE) - 1)
                T.sync_warp()
                arrive_warp(t.full, full_of_half(stage, 1 - stage), t.tx)
                walk.step(place, index, cursor, first_row, t)
                turn = next_turn(turn, NUM_STAGES)

    return producer

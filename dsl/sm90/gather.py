"""The producer warpgroup: gather the tokens of a block by index, one by one, into a stage.

Each of its four warps has 16 tokens of a block. Their indices are read by its lanes two blocks ahead and become
addresses one block ahead, so that neither the list nor, with ``prefetch``, what the addresses point to is waited for.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.sm90.sparse_tile import (
    NUM_PIECES,
    NUM_STAGES,
    TOKENS_PER_WARP,
    WARP,
    Roles,
    columns_of_pieces,
)
from tilemla.dsl.sm90.tile import (
    ATOM_BYTES,
    SLICE,
    STAGE_COLUMNS,
    WARPGROUP,
    arrive_warp,
    next_turn,
    phase_of,
    stage_of,
)

_CHUNK = 8  # elements of 16 bytes
_ROW_BYTES = 128  # of an atom
_STAGE_ATOMS = STAGE_COLUMNS // SLICE

# Where the producer is in the walk, two blocks ahead of the one it gathers: a local int32 buffer. Of the request: the
# block, one past the last, the blocks of the main list, and how many indices each list has.
REQUEST, BLOCK, END, MAIN, LENGTH, EXTRA_LENGTH = range(6)
CURSOR_SIZE = 6


def _to(stage, row, chunk, t) -> Any:
    """Address of a chunk of a row of the first atom of a stage."""
    return T.call_extern(
        "handle",
        "tilemla::shift",
        T.address_of(t.kv[0, 0, 0]),
        (stage * _STAGE_ATOMS) * ATOM_BYTES + row * _ROW_BYTES + T.bitwise_xor(chunk, row % 8) * 16,
    )


def make_walk(blocks_of: Any, read_index: Any, address: Any) -> SimpleNamespace:
    """Make the macros ``start`` and ``step`` of the walk over the blocks of all requests.

    Parameters
    ----------
    blocks_of : callable
        Of request and t: first block, end, blocks of the main list, and the lengths of both.
    read_index : macro
        ``(index, cursor, token, t)``: put the index of a token of the cursor's block into ``index[0]``, -1 when it is
        past its list's end, and into ``index[1]`` whether the list is the extra one.
    address : macro
        ``(place, index, t)``: put the address of ``index`` into ``place[0]``, 0 when it is invalid.
    """

    @T.macro
    def seek(cursor, t):
        # To the first block of the first request from cursor[REQUEST] on that has one; past the last if none has.
        cursor[BLOCK] = 0
        cursor[END] = 0
        while (cursor[REQUEST] <= t.part.end_request_inclusive) & (cursor[BLOCK] >= cursor[END]):
            bounds = blocks_of(cursor[REQUEST], t)
            begin = T.alloc_var("int32", init=bounds.begin)
            end = T.alloc_var("int32", init=bounds.end)
            if end > begin:
                cursor[BLOCK] = begin
                cursor[END] = end
                cursor[MAIN] = bounds.main
                cursor[LENGTH] = bounds.length
                cursor[EXTRA_LENGTH] = bounds.extra_length
            else:
                cursor[REQUEST] += 1

    @T.macro
    def fetch(index, cursor, t):
        index[0] = -1
        index[1] = 0
        if cursor[REQUEST] <= t.part.end_request_inclusive:
            token = t.tx % WARPGROUP // WARP * TOKENS_PER_WARP + t.tx % TOKENS_PER_WARP
            read_index(index, cursor, token, t)
            cursor[BLOCK] += 1
            if cursor[BLOCK] >= cursor[END]:
                cursor[REQUEST] += 1
                seek(cursor, t)

    @T.macro
    def start(place, index, cursor, t):
        cursor[REQUEST] = t.part.begin_request
        seek(cursor, t)
        fetch(index, cursor, t)
        address(place, index, t)
        fetch(index, cursor, t)

    @T.macro
    def step(place, index, cursor, t):
        # The addresses of the next block, and the indices of the one after it.
        address(place, index, t)
        fetch(index, cursor, t)

    return SimpleNamespace(start=start, step=step)


@T.macro
def prefetch(place, num_bytes, t) -> None:
    """Ask the bytes of a token into L2, half of them by each of the two lanes that have its address."""
    if place[0] != 0:
        T.call_extern("handle", f"tilemla::prefetch<{num_bytes}>", place[0], t.tx % WARP // TOKENS_PER_WARP)


def make_dense_producer(head_dim_qk: int, roles: Roles, walk: SimpleNamespace, blocks_of: Any) -> Any:
    """Make the macro ``producer(t)`` for a cache of the queries' dtype: 16-byte asynchronous copies.

    A row's 128 bytes of an atom are copied by eight lanes, so that a copy of a warp is of four rows.
    """
    pieces = [(i, first // SLICE, width // SLICE) for i, first, width in columns_of_pieces(head_dim_qk, roles)]
    passes = tuple(range(TOKENS_PER_WARP * _CHUNK // WARP))

    @T.macro
    def producer(t):
        cursor = T.alloc_local((CURSOR_SIZE,), "int32")
        index = T.alloc_local((2,), "int32")
        place = T.alloc_local((1,), "int64")
        rows = T.alloc_local((len(passes),), "int64")
        turn = T.alloc_var("int32", init=0)
        warp = t.tx % WARPGROUP // WARP
        walk.start(place, index, cursor, t)
        for request in T.serial(t.part.begin_request, t.part.end_request_inclusive + 1):
            bounds = blocks_of(request, t)
            end = T.alloc_var("int32", init=bounds.end)
            for _block in T.serial(bounds.begin, end):
                stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
                for k in passes:
                    rows[k] = T.call_extern(
                        "int64", "tilemla::shuffle", place[0], k * (WARP // _CHUNK) + t.tx % WARP // _CHUNK
                    )
                valid = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::ballot", place[0] != 0))
                for piece, atom, atoms in pieces:
                    T.barrier_wait(t.empty[stage * NUM_PIECES + piece], phase_of(turn, NUM_STAGES) ^ 1)
                    for k in passes:
                        row = warp * TOKENS_PER_WARP + k * (WARP // _CHUNK) + t.tx % WARP // _CHUNK
                        T.call_extern(
                            "handle",
                            f"tilemla::gather_atoms<{atoms}>",
                            _to(stage, row, t.tx % _CHUNK, t),
                            rows[k],
                            atom,
                            t.tx % _CHUNK * 16,
                        )
                    T.cp_async_barrier_noinc(t.full[stage * NUM_PIECES + piece])
                if t.tx % WARP == 0:
                    t.valid[stage, warp] = T.bitwise_and(valid, 2**TOKENS_PER_WARP - 1)
                # The mask is there, too.
                T.sync_warp()
                arrive_warp(t.full, stage * NUM_PIECES + NUM_PIECES - 1, t.tx)
                walk.step(place, index, cursor, t)
                if roles.prefetches:
                    prefetch(place, head_dim_qk * 2, t)
                turn = next_turn(turn, NUM_STAGES)

    return producer


def make_fp8_producer(layout: Any, roles: Roles, walk: SimpleNamespace, blocks_of: Any) -> Any:
    """Make the macro ``producer(t)`` for a cache of bytes: what is converted in place lay in the stage before.

    Four lanes convert 64 values of a token, an atom; a warp does eight tokens at a time. The first piece of a block is
    loaded to registers before its stage is free. The others are copied to shared memory, where the piece that is
    converted after each belongs, or past them all: a copy waits for nobody, and many are under way at once.

    Parameters
    ----------
    layout : Fp8Layout
        Of a token.
    roles : Roles
        Its pieces.
    walk : SimpleNamespace
        Of `make_walk`.
    blocks_of : callable
        Of request and t: first block, and one past the last.
    """
    scales_apart = layout.scales_apart
    by_bytes = "true" if scales_apart else "false"
    scale_words = 2 if scales_apart else 4
    num_atoms = layout.head_dim_nope // SLICE
    rope_offset = layout.head_dim_nope + (0 if scales_apart else layout.scale_bytes)
    firsts = [column // SLICE for column in roles.pieces]
    # Of those loaded to registers: number, first atom and atoms.
    loaded = [(piece, firsts[piece], firsts[piece + 1] - firsts[piece]) for piece in range(roles.pieces_loaded)]
    # Of the others, which have two atoms: number, first atom, and where its bytes lie until it is converted.
    kept_at = (*firsts[2:], _STAGE_ATOMS - 1 if scales_apart else num_atoms - 1)
    later = [(piece, firsts[piece], kept_at[piece - 1]) for piece in range(roles.pieces_loaded, NUM_PIECES)]
    groups = (0, 1)  # of eight tokens each
    # In the order of their conversion: a piece's number, first atom, atoms, place and group, and what is read from
    # shared memory meanwhile: piece, place and group.
    flat = [(*piece, None, g) for piece in loaded for g in groups]
    flat += [(piece, first, 2, free, g) for piece, first, free in later for g in groups]
    follows = [(piece, free, g) if free is not None else None for piece, _, _, free, g in flat[1:]] + [None]
    units = tuple((*unit, follow) for unit, follow in zip(flat, follows, strict=True))
    words = 8  # of 32 bits in two atoms that a thread converts
    passes = tuple(range(TOKENS_PER_WARP * _CHUNK // WARP))

    @T.macro
    def find_rows(rows, place, t):
        for g in groups:
            rows[g] = T.call_extern("int64", "tilemla::shuffle", place[0], g * 8 + t.tx % WARP // 4)
            if scales_apart:
                rows[2 + g] = T.call_extern("int64", "tilemla::shuffle", place[1], g * 8 + t.tx % WARP // 4)

    @T.macro
    def load_scales(scales, rows, t):
        for g in groups:
            T.call_extern(
                "handle",
                f"tilemla::load_scales<{by_bytes}>",
                T.address_of(scales[g * scale_words]),
                rows[2 + g] if scales_apart else T.Select(rows[g] != 0, rows[g] + layout.head_dim_nope, T.int64(0)),
            )

    @T.macro
    def load_piece(raw, first, atoms, rows, t):
        for g in groups:
            T.call_extern(
                "handle",
                f"tilemla::load_atoms<{first}, {atoms}>",
                T.address_of(raw[g * words]),
                T.Select(rows[g] != 0, rows[g] + t.tx % 4 * 16, T.int64(0)),
            )

    @T.macro
    def copy_later(place, stage, warp, t):
        # Eight lanes copy the bytes of a token's two atoms; which of them is first alternates, as four lanes read it.
        lines = T.alloc_local((len(passes),), "int64")
        for k in passes:
            lines[k] = T.call_extern("int64", "tilemla::shuffle", place[0], k * 4 + t.tx % WARP // _CHUNK)
        for piece, first, free in later:
            for k in passes:
                T.call_extern(
                    "handle",
                    "tilemla::gather_atoms<1>",
                    T.call_extern(
                        "handle",
                        "tilemla::shift",
                        T.address_of(t.kv[0, 0, 0]),
                        (stage * _STAGE_ATOMS) * ATOM_BYTES
                        + (warp * TOKENS_PER_WARP + k * 4 + t.tx % WARP // _CHUNK) * _ROW_BYTES
                        + T.bitwise_xor(t.tx % _CHUNK, t.tx % (2 * _CHUNK) // _CHUNK * 4) * 16,
                    ),
                    lines[k],
                    free,
                    first * SLICE - free * _ROW_BYTES + t.tx % _CHUNK * 16,
                )
            if piece == NUM_PIECES - 1:
                for k in passes:
                    T.call_extern(
                        "handle",
                        "tilemla::gather_atoms<1>",
                        _to(stage, warp * TOKENS_PER_WARP + k * 4 + t.tx % WARP // _CHUNK, t.tx % _CHUNK, t),
                        lines[k],
                        num_atoms,
                        rope_offset - num_atoms * _ROW_BYTES + t.tx % _CHUNK * 16,
                    )
            T.ptx_commit_group()

    @T.macro
    def read_bytes(raw, stage, warp, free, g, t):
        T.call_extern(
            "handle",
            "tilemla::read_bytes",
            T.address_of(raw[0]),
            T.call_extern(
                "handle",
                "tilemla::shift",
                T.address_of(t.kv[0, 0, 0]),
                (stage * _STAGE_ATOMS + free) * ATOM_BYTES
                + (warp * TOKENS_PER_WARP + g * 8 + t.tx % WARP // 4) * _ROW_BYTES
                + T.bitwise_xor(t.tx % 4, t.tx % 8 // 4 * 4) * 16,
            ),
        )

    @T.macro
    def store(raw, offset, scales, stage, warp, first, atoms, g, t):
        T.call_extern(
            "handle",
            f"tilemla::store_atoms<{by_bytes}, {first}, {atoms}>",
            _to(stage, warp * TOKENS_PER_WARP + g * 8 + t.tx % WARP // 4, t.tx % 4 * 2, t),
            T.address_of(raw[offset]),
            T.address_of(scales[g * scale_words]),
        )

    @T.macro
    def hand_over(stage, piece, t):
        T.sync_warp()
        arrive_warp(t.full, stage * NUM_PIECES + piece, t.tx)

    @T.macro
    def producer(t):
        cursor = T.alloc_local((CURSOR_SIZE,), "int32")
        index = T.alloc_local((2,), "int32")
        place = T.alloc_local((2,), "int64")
        rows = T.alloc_local((4,), "int64")
        ahead = [T.alloc_local((2 * words,), "uint32") for _ in loaded]
        raw = [T.alloc_local((words,), "uint32") for _ in groups]
        scales = T.alloc_local((2 * scale_words,), "uint32")
        next_scales = T.alloc_local((2 * scale_words,), "uint32")
        turn = T.alloc_var("int32", init=0)
        warp = t.tx % WARPGROUP // WARP
        walk.start(place, index, cursor, t)
        find_rows(rows, place, t)
        load_scales(next_scales, rows, t)
        for piece, first, atoms in loaded:
            load_piece(ahead[piece], first, atoms, rows, t)
        for request in T.serial(t.part.begin_request, t.part.end_request_inclusive + 1):
            bounds = blocks_of(request, t)
            end = T.alloc_var("int32", init=bounds.end)
            for _block in T.serial(bounds.begin, end):
                stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
                valid = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::ballot", place[0] != 0))
                for piece in T.unroll(NUM_PIECES):
                    T.barrier_wait(t.empty[stage * NUM_PIECES + piece], phase_of(turn, NUM_STAGES) ^ 1)
                if t.tx % WARP == 0:
                    t.valid[stage, warp] = T.bitwise_and(valid, 2**TOKENS_PER_WARP - 1)
                copy_later(place, stage, warp, t)
                walk.step(place, index, cursor, t)
                if roles.prefetches:
                    prefetch(place, layout.bytes_apart, t)
                for i in T.unroll(2 * scale_words):
                    scales[i] = next_scales[i]
                find_rows(rows, place, t)
                load_scales(next_scales, rows, t)
                for piece, first, atoms, free, g, follows in units:
                    # What is converted next is read before this is.
                    if follows is not None:
                        next_piece, next_free, next_g = follows
                        if next_g == 0:
                            T.ptx_wait_group(NUM_PIECES - 1 - next_piece)
                            T.sync_warp()
                        read_bytes(raw[next_g], stage, warp, next_free, next_g, t)
                        # Where these bytes lay may be where others of the warp store.
                        T.sync_warp()
                    if free is None:
                        store(ahead[piece], g * words, scales, stage, warp, first, atoms, g, t)
                    else:
                        store(raw[g], 0, scales, stage, warp, first, atoms, g, t)
                    if g == groups[-1]:
                        hand_over(stage, piece, t)
                        if free is None:
                            load_piece(ahead[piece], first, atoms, rows, t)
                turn = next_turn(turn, NUM_STAGES)

    return producer

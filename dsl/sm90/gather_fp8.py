"""The producer warpgroup over a cache of bytes: tokens are converted on their way into a stage (`gather`)."""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.sm90.gather import (
    AHEAD,
    CHUNK,
    CHUNK_BYTES,
    CURSOR_SIZE,
    ROW_BYTES,
    STAGE_ATOMS,
    TOKENS_PER_PASS,
    chunk_place,
    first_row_of,
    shared_address,
)
from tilemla.dsl.sm90.sparse_tile import ALONE, NUM_PIECES, NUM_STAGES, PIECES, WARP, tokens_of_warp
from tilemla.dsl.sm90.tile import (
    ATOM_BYTES,
    ROWS,
    SLICE,
    arrive_warp,
    next_turn,
    phase_of,
    stage_of,
)

_GROUP = 8  # tokens that a warp converts two atoms of at once
_TOKENS = tokens_of_warp(ALONE)
_GROUPS = tuple(range(_TOKENS // _GROUP))
_PASSES = tuple(range(_TOKENS // TOKENS_PER_PASS))
_PIECES = tuple(range(NUM_PIECES))
_WORDS = 8  # of 32 bits in two atoms that a thread converts

# Where the first piece of the next block is copied to, a row of 128 bytes for each of its tokens, and all their scales.
RAW_SHAPE = (ROWS, ROW_BYTES // 4)
RAW_SCALES_SHAPE = (ROWS, NUM_PIECES)


def make_fp8_producer(layout: Any, walk: SimpleNamespace) -> Any:
    """Make the macro ``producer(t)`` for a cache of bytes: what is converted in place lay in the stage before.

    Four lanes convert 64 values of a token, an atom; a warp does eight tokens at a time. All bytes are copied to shared
    memory: a copy waits for nobody, and many are under way at once. The first piece of a block and the scales are on
    their way while the block before is converted. The others are copied once their stage is free, where the piece that
    is converted after each belongs, or past them all.

    Parameters
    ----------
    layout : Fp8Layout
        Of a token.
    walk : SimpleNamespace
        Of `make_walk`.
    """
    scales_apart = layout.scales_apart
    by_bytes = "true" if scales_apart else "false"
    scale_bytes = NUM_PIECES * (2 if scales_apart else 4)  # of a token
    num_atoms = layout.head_dim_nope // SLICE
    rope_offset = layout.head_dim_nope + (0 if scales_apart else layout.scale_bytes)
    firsts = [column // SLICE for column in PIECES]
    ends = (*firsts[1:], num_atoms)
    # Where the bytes of a piece lie until it is converted: an atom of its stage, None for those copied ahead.
    kept_at = (None, *firsts[2:], STAGE_ATOMS - 1 if scales_apart else num_atoms - 1)
    pieces = [(i, first, end - first, kept) for i, first, end, kept in zip(_PIECES, firsts, ends, kept_at, strict=True)]
    later = [(piece, first, kept) for piece, first, _, kept in pieces if kept is not None]
    # In the order of their conversion: a piece and a group, and what is read from shared memory meanwhile: piece, place
    # and group.
    flat = [(*piece, g) for piece in pieces for g in _GROUPS]
    follows = [(piece, kept, g) for piece, _, _, kept, g in flat[1:]] + [None]
    units = tuple((n % 2, *unit, follow) for n, (unit, follow) in enumerate(zip(flat, follows, strict=True)))

    def copies_left(piece):
        # under way, those begun after a piece's: of later pieces, and from the second one on those of the next block
        return NUM_PIECES - 1 - piece + (1 if piece > 1 else 0)

    def row_chunk(row, chunk):
        # of a token's bytes of two atoms: which atom is first alternates, as four lanes read both
        return row * ROW_BYTES + T.bitwise_xor(chunk, row % 2 * 4) * CHUNK_BYTES

    @T.macro
    def copy_ahead(place, first_row, t):
        for k in _PASSES:
            row = k * TOKENS_PER_PASS + t.tx % WARP // CHUNK
            T.call_extern(
                "handle",
                "tilemla::gather_atoms<1>",
                shared_address(t.raw, first_row, 0) + row_chunk(row, t.tx % CHUNK),
                T.call_extern("int64", "tilemla::shuffle", place[0], row),
                0,
                t.tx % CHUNK * CHUNK_BYTES,
            )
        if t.tx % WARP < _TOKENS:
            T.call_extern(
                "handle",
                f"tilemla::copy_bytes<{scale_bytes}>",
                shared_address(t.raw_scales, first_row + t.tx % WARP, 0),
                place[1] if scales_apart else place[0],
                0 if scales_apart else layout.head_dim_nope,
            )
        T.ptx_commit_group()

    @T.macro
    def copy_later(place, stage, first_row, kv, t):
        # Eight lanes copy the bytes of a token's two atoms.
        lines = T.alloc_local((len(_PASSES),), "int64")
        for k in _PASSES:
            lines[k] = T.call_extern("int64", "tilemla::shuffle", place[0], k * TOKENS_PER_PASS + t.tx % WARP // CHUNK)
        for piece, first, free in later:
            for k in _PASSES:
                T.call_extern(
                    "handle",
                    "tilemla::gather_atoms<1>",
                    kv
                    + (
                        stage * STAGE_ATOMS * ATOM_BYTES
                        + first_row * ROW_BYTES
                        + row_chunk(k * TOKENS_PER_PASS + t.tx % WARP // CHUNK, t.tx % CHUNK)
                    ),
                    lines[k],
                    free,
                    first * SLICE - free * ROW_BYTES + t.tx % CHUNK * CHUNK_BYTES,
                )
            if piece < NUM_PIECES - 1:
                T.ptx_commit_group()
        for k in _PASSES:
            T.call_extern(
                "handle",
                "tilemla::gather_atoms<1>",
                chunk_place(stage, first_row, k * TOKENS_PER_PASS + t.tx % WARP // CHUNK, t.tx % CHUNK, kv),
                lines[k],
                num_atoms,
                rope_offset - num_atoms * ROW_BYTES + t.tx % CHUNK * CHUNK_BYTES,
            )
        T.ptx_commit_group()

    @T.macro
    def take_scales(scales, first_row, t):
        for g in _GROUPS:
            row = first_row + g * _GROUP + t.tx % WARP // 4
            if scales_apart:
                for half in T.unroll(2):
                    word = T.alloc_var("uint32", init=t.raw_scales[row, half])
                    scales[g * NUM_PIECES + half * 2] = T.bitwise_and(word, T.uint32(0xFFFF))
                    scales[g * NUM_PIECES + half * 2 + 1] = T.shift_right(word, T.uint32(16))
            else:
                for v in T.vectorized(NUM_PIECES):
                    scales[g * NUM_PIECES + v] = t.raw_scales[row, v]

    @T.macro
    def read_bytes(raw, stage, first_row, kept, g, kv, t):
        # of a piece that was copied to an atom of its stage, or ahead
        row = g * _GROUP + t.tx % WARP // 4
        if kept is None:
            rows = shared_address(t.raw, first_row, 0)
        else:
            rows = kv + ((stage * STAGE_ATOMS + kept) * ATOM_BYTES + first_row * ROW_BYTES)
        T.call_extern(
            "handle",
            "tilemla::read_bytes",
            T.address_of(raw[0]),
            rows + row_chunk(row, t.tx % 4),
            rows + row_chunk(row, t.tx % 4 + 4),
        )

    @T.macro
    def store(raw, scales, stage, first_row, piece, first, atoms, g, kv, t):
        T.call_extern(
            "handle",
            f"tilemla::store_atoms<{by_bytes}, {first}, {atoms}>",
            chunk_place(stage, first_row, g * _GROUP + t.tx % WARP // 4, t.tx % 4 * 2, kv),
            T.address_of(raw[0]),
            scales[g * NUM_PIECES + piece],
        )

    @T.macro
    def producer(t):
        cursor = T.alloc_local((CURSOR_SIZE,), "int32")
        index = T.alloc_local((2,), "int32")
        place = T.alloc_local((2,), "int64")
        raw = [T.alloc_local((_WORDS,), "uint32") for _ in range(2)]
        scales = T.alloc_local((len(_GROUPS) * NUM_PIECES,), "uint32")
        turn = T.alloc_var("int32", init=0)
        first_row = T.alloc_var("int32", init=first_row_of(ALONE, t))
        warp = T.truncdiv(first_row, _TOKENS)
        kv = T.alloc_var("int32", init=shared_address(t.kv, 0, 0, 0))
        walk.start(place, index, cursor, first_row, t)
        copy_ahead(place, first_row, t)
        while cursor[AHEAD] > 0:
            cursor[AHEAD] -= 1
            stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
            valid = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::ballot", place[0] != 0))
            for piece in T.unroll(NUM_PIECES):
                T.barrier_wait(t.empty[stage * NUM_PIECES + piece], phase_of(turn, NUM_STAGES) ^ 1)
            if t.tx % WARP == 0:
                t.valid[stage, warp] = T.bitwise_and(valid, 2**_TOKENS - 1)
            copy_later(place, stage, first_row, kv, t)
            T.call_extern("handle", f"tilemla::wait_copies<{copies_left(0)}>")
            T.sync_warp()
            take_scales(scales, first_row, t)
            read_bytes(raw[0], stage, first_row, None, 0, kv, t)
            for parity, piece, first, atoms, _kept, g, follow in units:
                # What is converted next is read before this is.
                if follow is not None:
                    next_piece, next_kept, next_g = follow
                    if next_g == 0:
                        T.call_extern("handle", f"tilemla::wait_copies<{copies_left(next_piece)}>")
                        T.sync_warp()
                    read_bytes(raw[1 - parity], stage, first_row, next_kept, next_g, kv, t)
                    # Where these bytes lay may be where others of the warp store.
                    T.sync_warp()
                store(raw[parity], scales, stage, first_row, piece, first, atoms, g, kv, t)
                if g == _GROUPS[-1]:
                    T.sync_warp()
                    arrive_warp(t.full, stage * NUM_PIECES + piece, t.tx)
                    if piece == 0:
                        walk.step(place, index, cursor, first_row, t)
                        copy_ahead(place, first_row, t)
            turn = next_turn(turn, NUM_STAGES)

    return producer

"""The producer warpgroup over a cache of bytes: tokens are converted on their way into a stage (`gather`)."""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.sm90.gather import (
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
from tilemla.dsl.sm90.tile import ATOM_BYTES, SLICE, arrive_warp, next_turn, phase_of, request_of, stage_of

_BARRIER_BYTES = 8
_GROUP = 8  # tokens that a warp converts two atoms of at once
_PIECES_LOADED = {1: 1, 2: 4}  # to registers before their stage is free, by the thread blocks that share a block


def make_fp8_producer(layout: Any, walk: SimpleNamespace, blocks_of: Any, blocks: int = ALONE) -> Any:
    """Make the macro ``producer(t)`` for a cache of bytes: what is converted in place lay in the stage before.

    Four lanes convert 64 values of a token, an atom; a warp does eight tokens at a time. The first pieces of a block
    are loaded to registers before its stage is free. The others are copied to shared memory, where the piece that is
    converted after each belongs, or past them all: a copy waits for nobody, and many are under way at once. Where all
    pieces are in registers the rope part is, too; otherwise it is copied.

    Parameters
    ----------
    layout : Fp8Layout
        Of a token.
    walk : SimpleNamespace
        Of `make_walk`.
    blocks_of : callable
        Of a request's place, itself and t: first block, and one past the last.
    blocks : int
        Thread blocks that convert a block's tokens together, each a share, and store what comes of it to one another.
    """
    scales_apart = layout.scales_apart
    by_bytes = "true" if scales_apart else "false"
    scale_bytes = 2 if scales_apart else 4  # of a piece
    num_atoms = layout.head_dim_nope // SLICE
    rope_offset = layout.head_dim_nope + (0 if scales_apart else layout.scale_bytes)
    tokens = tokens_of_warp(blocks)
    firsts = [column // SLICE for column in PIECES]
    ends = (*firsts[1:], num_atoms)
    # Number, first atom and atoms of a piece, and where its bytes lie until it is converted, None for registers.
    kept_at = (None, *firsts[2:], STAGE_ATOMS - 1 if scales_apart else num_atoms - 1)
    pieces = [
        (piece, first, end - first, None if piece < _PIECES_LOADED[blocks] else kept)
        for piece, first, end, kept in zip(range(NUM_PIECES), firsts, ends, kept_at, strict=True)
    ]
    all_loaded = _PIECES_LOADED[blocks] == NUM_PIECES
    loaded = [(piece, first, atoms) for piece, first, atoms, kept in pieces if kept is None]
    later = [(piece, first, kept) for piece, first, _, kept in pieces if kept is not None]
    groups = tuple(range(tokens // _GROUP))
    # In the order of their conversion: a piece and a group, and what is read from shared memory meanwhile: piece, place
    # and group.
    flat = [(*piece, g) for piece in pieces for g in groups]
    follows = [(piece, kept, g) if kept is not None else None for piece, _, _, kept, g in flat[1:]] + [None]
    units = tuple((n % 2, *unit, follow) for n, (unit, follow) in enumerate(zip(flat, follows, strict=True)))
    words = 8  # of 32 bits in two atoms that a thread converts
    passes = tuple(range(tokens // TOKENS_PER_PASS))
    # Atoms of a piece, and bytes of it that a warp of the other thread block stores here; with the last one the rope
    # part and its word of the mask.
    atoms_of_piece = [tuple(range(first, end)) for first, end in zip(firsts, ends, strict=True)]
    bytes_of_piece = [len(atoms) * ROW_BYTES * tokens for atoms in atoms_of_piece]
    bytes_of_piece[-1] += ROW_BYTES * tokens + 4

    @T.macro
    def find_rows(rows, place, t):
        for g in groups:
            rows[g] = T.call_extern("int64", "tilemla::shuffle", place[0], g * _GROUP + t.tx % WARP // 4)
            if scales_apart:
                rows[2 + g] = T.call_extern("int64", "tilemla::shuffle", place[1], g * _GROUP + t.tx % WARP // 4)

    @T.macro
    def load_scale(scales, piece, rows, t):
        for g in groups:
            T.call_extern(
                "handle",
                f"tilemla::load_scale<{by_bytes}>",
                T.address_of(scales[g * NUM_PIECES + piece]),
                rows[2 + g] if scales_apart else rows[g],
                (0 if scales_apart else layout.head_dim_nope) + piece * scale_bytes,
            )

    @T.macro
    def load_piece(raw, first, atoms, rows, t):
        for g in groups:
            T.call_extern(
                "handle",
                f"tilemla::load_atoms<{first}, {atoms}>",
                T.address_of(raw[g * words]),
                rows[g],
                t.tx % 4 * CHUNK_BYTES,
            )

    @T.macro
    def copy_later(place, stage, first_row, kv, t):
        # Eight lanes copy the bytes of a token's two atoms; which of them is first alternates, as four lanes read it.
        lines = T.alloc_local((len(passes),), "int64")
        for k in passes:
            lines[k] = T.call_extern("int64", "tilemla::shuffle", place[0], k * TOKENS_PER_PASS + t.tx % WARP // CHUNK)
        for piece, first, free in later:
            for k in passes:
                T.call_extern(
                    "handle",
                    "tilemla::gather_atoms<1>",
                    kv
                    + (
                        stage * STAGE_ATOMS * ATOM_BYTES
                        + (first_row + k * TOKENS_PER_PASS + t.tx % WARP // CHUNK) * ROW_BYTES
                        + T.bitwise_xor(t.tx % CHUNK, t.tx % (2 * CHUNK) // CHUNK * 4) * CHUNK_BYTES
                    ),
                    lines[k],
                    free,
                    first * SLICE - free * ROW_BYTES + t.tx % CHUNK * CHUNK_BYTES,
                )
            if piece < NUM_PIECES - 1:
                T.ptx_commit_group()
        for k in passes:
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
    def read_bytes(raw, stage, first_row, kept, g, kv, t):
        T.call_extern(
            "handle",
            "tilemla::read_bytes",
            T.address_of(raw[0]),
            kv
            + (
                (stage * STAGE_ATOMS + kept) * ATOM_BYTES
                + (first_row + g * _GROUP + t.tx % WARP // 4) * ROW_BYTES
                + T.bitwise_xor(t.tx % 4, t.tx % 8 // 4 * 4) * CHUNK_BYTES
            ),
        )

    @T.macro
    def store(raw, offset, scales, stage, first_row, piece, first, atoms, g, kv, t):
        T.call_extern(
            "handle",
            f"tilemla::store_atoms<{by_bytes}, {first}, {atoms}>",
            chunk_place(stage, first_row, g * _GROUP + t.tx % WARP // 4, t.tx % 4 * 2, kv),
            T.address_of(raw[offset]),
            scales[g * NUM_PIECES + piece],
        )

    @T.macro
    def send_last(rope, stage, word, first_row, kv, there, t):
        # The rope part, where P will soon be, to here and there, and the mask.
        for k in passes:
            T.call_extern(
                "handle",
                "tilemla::store_chunk",
                chunk_place(stage, first_row, k * TOKENS_PER_PASS + t.tx % WARP // CHUNK, t.tx % CHUNK, kv)
                + num_atoms * ATOM_BYTES,
                T.address_of(rope[k * 4]),
                there.barrier(stage, NUM_PIECES - 1),
                there.distance,
            )
        if t.tx % WARP == 0:
            T.call_extern(
                "handle",
                "tilemla::send_word",
                shared_address(t.valid, stage, word),
                there.barrier(stage, NUM_PIECES - 1),
                there.distance,
            )

    @T.macro
    def load_rope(rope, place, t):
        for k in passes:
            line = T.alloc_var(
                "int64",
                init=T.call_extern("int64", "tilemla::shuffle", place[0], k * TOKENS_PER_PASS + t.tx % WARP // CHUNK),
            )
            T.call_extern(
                "handle",
                "tilemla::load_chunk",
                T.address_of(rope[k * 4]),
                line,
                rope_offset + t.tx % CHUNK * CHUNK_BYTES,
            )

    @T.macro
    def hand_over(rope, stage, piece, word, first_row, kv, there, t):
        if blocks == ALONE:
            T.sync_warp()
            arrive_warp(t.full, stage * NUM_PIECES + piece, t.tx)
        else:
            # The warp's rows of an atom lie side by side: what is there is copied to the other thread block as it is.
            if piece == NUM_PIECES - 1:
                send_last(rope, stage, word, first_row, kv, there, t)
            T.fence_proxy_async()
            T.sync_warp()
            if t.tx % WARP == 0:
                T.call_extern("handle", "tilemla::expect", there.barrier(stage, piece), bytes_of_piece[piece])
                for atom in atoms_of_piece[piece]:
                    T.call_extern(
                        "handle",
                        "tilemla::copy_to_other",
                        kv + ((stage * STAGE_ATOMS + atom) * ATOM_BYTES + first_row * ROW_BYTES),
                        tokens * ROW_BYTES,
                        there.barrier(stage, piece),
                        there.distance,
                    )

    @T.macro
    def producer(t):
        cursor = T.alloc_local((CURSOR_SIZE,), "int32")
        index = T.alloc_local((2,), "int32")
        place = T.alloc_local((2,), "int64")
        rows = T.alloc_local((4,), "int64")
        rope = T.alloc_local((len(passes) * 4,), "uint32")
        ahead = [T.alloc_local((len(groups) * words,), "uint32") for _ in loaded]
        raw = [T.alloc_local((words,), "uint32") for _ in range(2)]
        scales = T.alloc_local((len(groups) * NUM_PIECES,), "uint32")
        turn = T.alloc_var("int32", init=0)
        first_row = T.alloc_var("int32", init=first_row_of(blocks, t))
        word = T.truncdiv(first_row, tokens)
        kv = T.alloc_var("int32", init=shared_address(t.kv, 0, 0, 0))
        there = None
        if blocks != ALONE:
            full = T.alloc_var("int32", init=shared_address(t.full, 0))
            distance = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::distance_to_other", kv))
            there = SimpleNamespace(
                distance=distance, barrier=lambda stage, piece: full + (stage * NUM_PIECES + piece) * _BARRIER_BYTES
            )
        walk.start(place, index, cursor, first_row, t)
        find_rows(rows, place, t)
        for piece, first, atoms, kept in pieces:
            load_scale(scales, piece, rows, t)
            if kept is None:
                load_piece(ahead[piece], first, atoms, rows, t)
        if all_loaded:
            load_rope(rope, place, t)
        for visited in T.serial(t.part.begin_place, t.part.end_place_inclusive + 1):
            bounds = blocks_of(visited, request_of(visited, t), t)
            end = T.alloc_var("int32", init=bounds.end)
            for _block in T.serial(bounds.begin, end):
                stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
                valid = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::ballot", place[0] != 0))
                for piece in T.unroll(NUM_PIECES):
                    T.barrier_wait(t.empty[stage * NUM_PIECES + piece], phase_of(turn, NUM_STAGES) ^ 1)
                if t.tx % WARP == 0:
                    t.valid[stage, word] = T.bitwise_and(valid, 2**tokens - 1)
                if not all_loaded:
                    copy_later(place, stage, first_row, kv, t)
                for parity, piece, first, atoms, kept, g, follow in units:
                    # What is converted next is read before this is.
                    if follow is not None:
                        next_piece, next_free, next_g = follow
                        if next_g == 0:
                            T.call_extern("handle", f"tilemla::wait_copies<{NUM_PIECES - 1 - next_piece}>")
                            T.sync_warp()
                        read_bytes(raw[1 - parity], stage, first_row, next_free, next_g, kv, t)
                        # Where these bytes lay may be where others of the warp store.
                        T.sync_warp()
                    if kept is None:
                        store(ahead[piece], g * words, scales, stage, first_row, piece, first, atoms, g, kv, t)
                    else:
                        store(raw[parity], 0, scales, stage, first_row, piece, first, atoms, g, kv, t)
                    if g == groups[-1]:
                        hand_over(rope, stage, piece, word, first_row, kv, there, t)
                        if piece == 0:
                            # Not earlier: what was loaded last would be waited for together with the index.
                            walk.step(place, index, cursor, first_row, t)
                            find_rows(rows, place, t)
                        load_scale(scales, piece, rows, t)
                        if kept is None:
                            load_piece(ahead[piece], first, atoms, rows, t)
                        if all_loaded and piece == NUM_PIECES - 1:
                            load_rope(rope, place, t)
                turn = next_turn(turn, NUM_STAGES)

    return producer

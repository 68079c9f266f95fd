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
    NUM_PIECES,
    NUM_STAGES,
    PIECES,
    QUARTER,
    TURN_PIECES,
    WARP,
    Roles,
    columns_of_pieces,
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
    stage_of,
)

_CHUNK = 8  # elements of 16 bytes
_CHUNK_BYTES = 16
_BARRIER_BYTES = 8
_ROW_BYTES = 128  # of an atom
_STAGE_ATOMS = STAGE_COLUMNS // SLICE
_TOKENS_PER_PASS = WARP // _CHUNK  # that a warp copies 128 bytes of at once, and whose rows a swizzle tells apart

# Where the producer is in the walk, two blocks ahead of the one it gathers: a local int32 buffer. Of the request: the
# block, one past the last, the blocks of the main list, and how many indices each list has.
REQUEST, BLOCK, END, MAIN, LENGTH, EXTRA_LENGTH = range(6)
CURSOR_SIZE = 6

_PASSES = tuple(range(tokens_of_warp(ALONE) // _TOKENS_PER_PASS))  # of a block's copies

_GROUP = 8  # tokens that a warp converts two atoms of at once
_PIECES_LOADED = {1: 1, 2: 4}  # to registers before their stage is free, by the thread blocks that share a block


def _to(stage, first_row, row, chunk, kv) -> Any:
    """Address of a chunk of a row of the first atom of a stage; `first_row` is a multiple of 8, `kv` that of stages."""
    within = row * _ROW_BYTES + T.bitwise_xor(chunk, row % 8) * _CHUNK_BYTES
    return kv + (stage * _STAGE_ATOMS * ATOM_BYTES + first_row * _ROW_BYTES + within)


def shared_address(buffer: Any, *indices: Any) -> Any:
    """Of an element in shared memory, as the 32 bits that its instructions take, int32: worth keeping."""
    return T.call_extern("int32", "tilemla::shared_address", T.address_of(buffer[indices]))


def first_row_of(blocks: int, t) -> Any:
    """The first of the rows of a stage that a producer's warp gathers, int32."""
    row = t.tx % WARPGROUP // WARP * tokens_of_warp(blocks)
    if blocks == ALONE:
        return row
    return T.call_extern("int32", "tilemla::rank_in_cluster") * (BLOCK_N // blocks) + row


def make_walk(blocks_of: Any, read_index: Any, address: Any, blocks: int = ALONE) -> SimpleNamespace:
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
    blocks : int
        Thread blocks that gather a block's tokens together.
    """
    tokens = tokens_of_warp(blocks)

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
    def fetch(index, cursor, first_row, t):
        index[0] = -1
        index[1] = 0
        if cursor[REQUEST] <= t.part.end_request_inclusive:
            read_index(index, cursor, first_row + t.tx % tokens, t)
            cursor[BLOCK] += 1
            if cursor[BLOCK] >= cursor[END]:
                cursor[REQUEST] += 1
                seek(cursor, t)

    @T.macro
    def start(place, index, cursor, first_row, t):
        cursor[REQUEST] = t.part.begin_request
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


def make_dense_producer(head_dim_qk: int, roles: Roles, walk: SimpleNamespace, blocks_of: Any) -> Any:
    """Make the macro ``producer(t)`` for a cache of the queries' dtype."""
    pieces = [(i, first // SLICE, width // SLICE) for i, first, width in columns_of_pieces(head_dim_qk, roles)]

    @T.macro
    def copy_block(stage, turn, first_row, rows, kv, t):
        for piece, atom, atoms in pieces:
            T.barrier_wait(t.empty[stage * NUM_PIECES + piece], phase_of(turn, NUM_STAGES) ^ 1)
            _copy_atoms(atoms, atom, stage, first_row, rows, kv, t)
            T.cp_async_barrier_noinc(t.full[stage * NUM_PIECES + piece])

    return _make_copying_producer(walk, blocks_of, copy_block, lambda stage: stage * NUM_PIECES + NUM_PIECES - 1)


def make_turn_producer(head_dim_qk: int, walk: SimpleNamespace, blocks_of: Any) -> Any:
    """Make the macro ``producer(t)`` for alternating warpgroups and a cache of the queries' dtype."""
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

    return _make_copying_producer(walk, blocks_of, copy_block, lambda stage: full_of_half(stage, 1 - stage))


@T.macro
def _copy_atoms(atoms, atom, stage, first_row, rows, kv, t) -> None:
    # Of a warp's tokens, asynchronously, 16 bytes at a time: eight lanes copy a row's 128 bytes of an atom, so that a
    # copy of a warp is of four rows.
    for k in _PASSES:
        T.call_extern(
            "handle",
            f"tilemla::gather_atoms<{atoms}>",
            _to(stage, first_row, k * _TOKENS_PER_PASS + t.tx % WARP // _CHUNK, t.tx % _CHUNK, kv),
            rows[k],
            atom,
            t.tx % _CHUNK * _CHUNK_BYTES,
        )


def _make_copying_producer(walk: SimpleNamespace, blocks_of: Any, copy_block: Any, last_full: Any) -> Any:
    """Make the macro ``producer(t)`` that copies tokens as they are.

    Parameters
    ----------
    walk : SimpleNamespace
        Of `make_walk`.
    blocks_of : callable
        Of request and t: first block, and one past the last.
    copy_block : macro
        ``(stage, turn, first_row, rows, kv, t)``: copy the tokens at the addresses ``rows``, each piece once there is
        room for it.
    last_full : callable
        Of a stage: the barrier of what is copied last, at which the word of the mask arrives, too.
    """

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
        for request in T.serial(t.part.begin_request, t.part.end_request_inclusive + 1):
            bounds = blocks_of(request, t)
            end = T.alloc_var("int32", init=bounds.end)
            for _block in T.serial(bounds.begin, end):
                stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
                for k in _PASSES:
                    rows[k] = T.call_extern(
                        "int64", "tilemla::shuffle", place[0], k * _TOKENS_PER_PASS + t.tx % WARP // _CHUNK
                    )
                valid = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::ballot", place[0] != 0))
                copy_block(stage, turn, first_row, rows, kv, t)
                if t.tx % WARP == 0:
                    t.valid[stage, warp] = T.bitwise_and(valid, 2 ** tokens_of_warp(ALONE) - 1)
                T.sync_warp()
                arrive_warp(t.full, last_full(stage), t.tx)
                walk.step(place, index, cursor, first_row, t)
                turn = next_turn(turn, NUM_STAGES)

    return producer


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
        Of request and t: first block, and one past the last.
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
    kept_at = (None, *firsts[2:], _STAGE_ATOMS - 1 if scales_apart else num_atoms - 1)
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
    passes = tuple(range(tokens // _TOKENS_PER_PASS))
    # Atoms of a piece, and bytes of it that a warp of the other thread block stores here; with the last one the rope
    # part and its word of the mask.
    atoms_of_piece = [tuple(range(first, end)) for first, end in zip(firsts, ends, strict=True)]
    bytes_of_piece = [len(atoms) * _ROW_BYTES * tokens for atoms in atoms_of_piece]
    bytes_of_piece[-1] += _ROW_BYTES * tokens + 4

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
                t.tx % 4 * _CHUNK_BYTES,
            )

    @T.macro
    def copy_later(place, stage, first_row, kv, t):
        # Eight lanes copy the bytes of a token's two atoms; which of them is first alternates, as four lanes read it.
        lines = T.alloc_local((len(passes),), "int64")
        for k in passes:
            lines[k] = T.call_extern(
                "int64", "tilemla::shuffle", place[0], k * _TOKENS_PER_PASS + t.tx % WARP // _CHUNK
            )
        for piece, first, free in later:
            for k in passes:
                T.call_extern(
                    "handle",
                    "tilemla::gather_atoms<1>",
                    kv
                    + (
                        stage * _STAGE_ATOMS * ATOM_BYTES
                        + (first_row + k * _TOKENS_PER_PASS + t.tx % WARP // _CHUNK) * _ROW_BYTES
                        + T.bitwise_xor(t.tx % _CHUNK, t.tx % (2 * _CHUNK) // _CHUNK * 4) * _CHUNK_BYTES
                    ),
                    lines[k],
                    free,
                    first * SLICE - free * _ROW_BYTES + t.tx % _CHUNK * _CHUNK_BYTES,
                )
            if piece < NUM_PIECES - 1:
                T.ptx_commit_group()
        for k in passes:
            T.call_extern(
                "handle",
                "tilemla::gather_atoms<1>",
                _to(stage, first_row, k * _TOKENS_PER_PASS + t.tx % WARP // _CHUNK, t.tx % _CHUNK, kv),
                lines[k],
                num_atoms,
                rope_offset - num_atoms * _ROW_BYTES + t.tx % _CHUNK * _CHUNK_BYTES,
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
                (stage * _STAGE_ATOMS + kept) * ATOM_BYTES
                + (first_row + g * _GROUP + t.tx % WARP // 4) * _ROW_BYTES
                + T.bitwise_xor(t.tx % 4, t.tx % 8 // 4 * 4) * _CHUNK_BYTES
            ),
        )

    @T.macro
    def store(raw, offset, scales, stage, first_row, piece, first, atoms, g, kv, t):
        T.call_extern(
            "handle",
            f"tilemla::store_atoms<{by_bytes}, {first}, {atoms}>",
            _to(stage, first_row, g * _GROUP + t.tx % WARP // 4, t.tx % 4 * 2, kv),
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
                _to(stage, first_row, k * _TOKENS_PER_PASS + t.tx % WARP // _CHUNK, t.tx % _CHUNK, kv)
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
                init=T.call_extern("int64", "tilemla::shuffle", place[0], k * _TOKENS_PER_PASS + t.tx % WARP // _CHUNK),
            )
            T.call_extern(
                "handle",
                "tilemla::load_chunk",
                T.address_of(rope[k * 4]),
                line,
                rope_offset + t.tx % _CHUNK * _CHUNK_BYTES,
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
                        kv + ((stage * _STAGE_ATOMS + atom) * ATOM_BYTES + first_row * _ROW_BYTES),
                        tokens * _ROW_BYTES,
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
        for request in T.serial(t.part.begin_request, t.part.end_request_inclusive + 1):
            bounds = blocks_of(request, t)
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

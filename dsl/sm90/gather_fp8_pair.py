"""The producer warpgroup of a pair of thread blocks over a cache of bytes: each converts half of a block for both.

The warpgroups that it serves take turns (`alternate`): in a stage the half of the output columns comes first whose
warpgroup makes the scores. A half is two pieces of two atoms. Four lanes convert 64 values of a token, an atom; a warp
has eight tokens.

What the next block's halves are made of is on its way while the other half is converted: the first half's is copied to
shared memory, the second's loaded to registers. Loads that are under way from one block to the next are waited for
together, whatever they were meant for, but not together with copies.
"""

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
from tilemla.dsl.sm90.sparse_tile import (
    NUM_STAGES,
    PAIR,
    QUARTER,
    TURN_PIECES,
    WARP,
    full_of_half,
    tokens_of_warp,
)
from tilemla.dsl.sm90.tile import ATOM_BYTES, HALF, SLICE, WARPGROUP, next_turn, phase_of, stage_of

_BARRIER_BYTES = 8
_ATOMS = QUARTER // SLICE  # of a piece
_WORDS = 4 * _ATOMS  # of 32 bits in a piece's bytes that a thread converts
_TOKENS = tokens_of_warp(PAIR)
_PASSES = tuple(range(_TOKENS // TOKENS_PER_PASS))
_ROWS_BYTES = _TOKENS * ROW_BYTES  # of a warp's tokens in an atom
_PIECES = HALF // QUARTER  # of a half
_PIECES_OF_HALF = tuple(range(_PIECES))
_HALF_ATOMS = tuple(range(_PIECES * _ATOMS))
# Where each thread's share of a half is copied to: its chunks, and the scales of their pieces.
RAW_SHAPE = (len(_HALF_ATOMS), WARPGROUP, CHUNK_BYTES // 4)
RAW_SCALES_SHAPE = (WARPGROUP, _PIECES)


def make_paired_producer(layout: Any, walk: SimpleNamespace) -> Any:
    """Make the macro ``producer(t)``.

    Parameters
    ----------
    layout : Fp8Layout
        Of a token.
    walk : SimpleNamespace
        Of `make_walk`.
    """
    scales_apart = layout.scales_apart
    by_bytes = "true" if scales_apart else "false"
    scale_bytes = 2 if scales_apart else 4  # of a piece
    num_atoms = layout.head_dim_nope // SLICE
    is_behind = num_atoms == 2 * HALF // SLICE  # the rope part; otherwise it is the last atom of the last piece
    first_scale = 0 if scales_apart else layout.head_dim_nope
    rope_offset = layout.head_dim_nope + (0 if scales_apart else layout.scale_bytes)

    @T.macro
    def find_rows(rows, place, t):
        rows[0] = T.call_extern("int64", "tilemla::shuffle", place[0], t.tx % WARP // 4)
        if scales_apart:
            rows[1] = T.call_extern("int64", "tilemla::shuffle", place[1], t.tx % WARP // 4)

    def scales_of(rows):
        return rows[1] if scales_apart else rows[0]

    @T.macro
    def copy_half(half, rows, t):
        # Each thread's chunks to where it alone reads them.
        thread = t.tx % WARPGROUP
        for k in _HALF_ATOMS:
            T.call_extern(
                "handle",
                "tilemla::gather_atoms<1>",
                shared_address(t.raw, k, thread, 0),
                rows[0],
                0,
                half * (_PIECES * _ATOMS * SLICE) + (k * SLICE + t.tx % 4 * CHUNK_BYTES),
            )
        T.call_extern(
            "handle",
            f"tilemla::copy_bytes<{_PIECES * scale_bytes}>",
            shared_address(t.raw_scales, thread, 0),
            scales_of(rows),
            first_scale + half * (_PIECES * scale_bytes),
        )
        T.ptx_commit_group()

    @T.macro
    def take_half(raw, scales, t):
        thread = t.tx % WARPGROUP
        T.call_extern("handle", "tilemla::wait_copies<0>")
        for k in _HALF_ATOMS:
            for v in T.vectorized(4):
                raw[k * 4 + v] = t.raw[k, thread, v]
        if scales_apart:
            scales[0] = T.bitwise_and(t.raw_scales[thread, 0], 0xFFFF)
            scales[1] = T.shift_right(t.raw_scales[thread, 0], T.uint32(16))
        else:
            for v in T.vectorized(2):
                scales[v] = t.raw_scales[thread, v]

    @T.macro
    def load_half(raw, scales, half, rows, t):
        for i in _PIECES_OF_HALF:
            T.call_extern(
                "handle",
                f"tilemla::load_scale<{by_bytes}>",
                T.address_of(scales[i]),
                scales_of(rows),
                first_scale + (half * _PIECES + i) * scale_bytes,
            )
        T.call_extern(
            "handle",
            f"tilemla::load_atoms<{_PIECES * _ATOMS}>",
            T.address_of(raw[0]),
            rows[0],
            half * (_PIECES * _ATOMS * SLICE) + t.tx % 4 * CHUNK_BYTES,
        )

    @T.macro
    def load_rope(rope, place, t):
        for k in _PASSES:
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
    def store_atoms(raw, offset, first, atoms, scale, stage, first_row, piece, kv, t):
        # `first` and `atoms` of the piece; their bytes, and the first one's scale
        T.call_extern(
            "handle",
            f"tilemla::store_atoms<{by_bytes}, {first}, {atoms}>",
            chunk_place(stage, first_row, t.tx % WARP // 4, t.tx % 4 * 2, kv) + piece * (_ATOMS * ATOM_BYTES),
            T.address_of(raw[offset]),
            scale,
        )

    @T.macro
    def store_half(raw, scales, half, stage, parity, first_row, kv, t):
        for i in _PIECES_OF_HALF:
            piece = half * _PIECES + i
            T.barrier_wait(t.empty[stage * TURN_PIECES + piece], parity)
            if is_behind or i == 0:
                store_atoms(raw, i * _WORDS, 0, _ATOMS, scales[i], stage, first_row, piece, kv, t)
            else:
                store_atoms(raw, i * _WORDS, 0, 1, scales[i], stage, first_row, piece, kv, t)
                if half == 0:
                    second_scale = T.shift_right(scales[i], T.uint32(8))
                    store_atoms(raw, i * _WORDS + _WORDS // _ATOMS, 1, 1, second_scale, stage, first_row, piece, kv, t)

    @T.macro
    def send_rope(rope, stage, first_row, barrier, kv, there, t):
        # To here and there. Where P will soon be, a copy of it would come too late.
        for k in _PASSES:
            T.call_extern(
                "handle",
                "tilemla::store_chunk",
                chunk_place(stage, first_row, k * TOKENS_PER_PASS + t.tx % WARP // CHUNK, t.tx % CHUNK, kv)
                + num_atoms * ATOM_BYTES,
                T.address_of(rope[k * 4]),
                barrier,
                there.distance,
            )

    @T.macro
    def hand_over(is_last, half, stage, word, first_row, rope, kv, there, t):
        # The warp's rows of an atom lie side by side: what is there is copied to the other thread block as it is.
        barrier = T.alloc_var("int32", init=there.full + full_of_half(stage, half) * _BARRIER_BYTES)
        if is_last:
            if t.tx % WARP == 0:
                t.valid[stage, word] = there.valid
        if is_behind:
            if is_last:
                send_rope(rope, stage, first_row, barrier, kv, there, t)
        elif half == 1:
            send_rope(rope, stage, first_row, barrier, kv, there, t)
        # Of a half, its atoms; a rope part that is the last of them has been sent.
        atoms = len(_HALF_ATOMS) if is_behind else len(_HALF_ATOMS) - half
        T.call_extern("handle", "tilemla::fence_shared")
        T.sync_warp()
        if T.call_extern("bool", "tilemla::elect"):
            T.call_extern(
                "handle",
                "tilemla::expect",
                barrier,
                len(_HALF_ATOMS) * _ROWS_BYTES + (_ROWS_BYTES if is_behind and is_last else 0) + (4 if is_last else 0),
            )
            if is_last:
                T.call_extern(
                    "handle", "tilemla::send_word", shared_address(t.valid, stage, word), barrier, there.distance
                )
            for atom in T.unroll(len(_HALF_ATOMS)):
                if atom < atoms:
                    T.call_extern(
                        "handle",
                        "tilemla::copy_to_other",
                        kv
                        + ((stage * STAGE_ATOMS + half * len(_HALF_ATOMS) + atom) * ATOM_BYTES + first_row * ROW_BYTES),
                        _ROWS_BYTES,
                        barrier,
                        there.distance,
                    )

    @T.macro
    def producer(t):
        cursor = T.alloc_local((CURSOR_SIZE,), "int32")
        index = T.alloc_local((2,), "int32")
        place = T.alloc_local((2,), "int64")
        rows = T.alloc_local((2,), "int64")
        rope = T.alloc_local((len(_PASSES) * 4,), "uint32")
        taken = T.alloc_local((_PIECES * _WORDS,), "uint32")
        taken_scales = T.alloc_local((_PIECES,), "uint32")
        loaded = T.alloc_local((_PIECES * _WORDS,), "uint32")
        loaded_scales = T.alloc_local((_PIECES,), "uint32")
        turn = T.alloc_var("int32", init=0)
        first_row = T.alloc_var("int32", init=first_row_of(PAIR, t))
        word = T.truncdiv(first_row, _TOKENS)
        kv = T.alloc_var("int32", init=shared_address(t.kv, 0, 0, 0))
        full = T.alloc_var("int32", init=shared_address(t.full, 0))
        distance = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::distance_to_other", kv))
        walk.start(place, index, cursor, first_row, t)
        find_rows(rows, place, t)
        copy_half(0, rows, t)
        load_half(loaded, loaded_scales, 1, rows, t)
        load_rope(rope, place, t)
        while cursor[AHEAD] > 0:
            cursor[AHEAD] -= 1
            stage = T.alloc_var("int32", init=stage_of(turn, NUM_STAGES))
            other = T.alloc_var("int32", init=1 - stage)
            parity = T.alloc_var("int32", init=phase_of(turn, NUM_STAGES) ^ 1)
            ballot = T.alloc_var("int32", init=T.call_extern("int32", "tilemla::ballot", place[0] != 0))
            valid = T.bitwise_and(ballot, 2**_TOKENS - 1)
            there = SimpleNamespace(full=full, distance=distance, valid=valid)
            take_half(taken, taken_scales, t)
            store_half(taken, taken_scales, stage, stage, parity, first_row, kv, t)
            hand_over(False, stage, stage, word, first_row, rope, kv, there, t)
            walk.step(place, index, cursor, first_row, t)
            find_rows(rows, place, t)
            copy_half(other, rows, t)
            store_half(loaded, loaded_scales, other, stage, parity, first_row, kv, t)
            T.barrier_wait(t.empty[stage * TURN_PIECES + TURN_PIECES - 1], parity)
            hand_over(True, other, stage, word, first_row, rope, kv, there, t)
            load_half(loaded, loaded_scales, stage, rows, t)
            load_rope(rope, place, t)
            turn = next_turn(turn, NUM_STAGES)

    return producer

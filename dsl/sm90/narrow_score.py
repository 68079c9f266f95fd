"""The scores of the decode kernel for few rows: Q in shared memory, S^T = K Q^T with K from registers, and the mask."""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import end_key_of_query, first_key_of_query, mask_score, needs_mask
from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.narrow_product import BATCH, PRODUCTS, multiply
from tilemla.dsl.sm90.narrow_tile import (
    A_REGISTERS,
    ATOM_BYTES,
    CHUNK,
    K_STEP,
    NUM_PIECES,
    PIECE_COLUMNS,
    ROW_BYTES,
    SCORES,
)

_UNIT_WORDS = K_STEP // 2  # of a K step of Q, 32-bit words
_STEPS_PER_ATOM = 4
_STEPS_PER_PIECE = PIECE_COLUMNS // K_STEP


def _offset_of_step(step) -> Any:
    """Of a K step of Q, in the 16-byte units of a wgmma descriptor."""
    return step // _STEPS_PER_ATOM * (ATOM_BYTES >> 4) + step % _STEPS_PER_ATOM * (K_STEP * 2 >> 4)


def make_scores(head_dim_qk: int, head_dim_v: int) -> SimpleNamespace:
    """Make the macros ``take_q``, ``score``, ``add_pieces`` and ``hide_scores``, in the order of their use.

    Q of a request is put into shared memory; a page's scores, of each piece, into accumulators; their sum, with the
    scales, into ``scaled``; and there what a row does not see becomes -inf.

    Parameters
    ----------
    head_dim_qk : int
        Columns of a query.
    head_dim_v : int
        Its latent columns.
    """
    accum = "float32"
    latent_steps, rope_steps = head_dim_v // K_STEP, (head_dim_qk - head_dim_v) // K_STEP

    def place_of(row, unit, at):
        # The first of two chunks of 16 columns of Q.
        within = T.bitwise_xor(T.truncmod(unit, _STEPS_PER_ATOM) * 2, row % 8) * CHUNK
        return at.q + T.truncdiv(unit, _STEPS_PER_ATOM) * ATOM_BYTES + row * ROW_BYTES + within

    @T.macro
    def load_unit(words, place, request, row, unit, wanted, t):
        T.call_extern(
            "handle",
            "tilemla::load_columns",
            T.address_of(words[place * _UNIT_WORDS]),
            T.address_of(t.q[request, t.head, t.tile[0] + row, unit * K_STEP]),
            wanted & (t.tile[0] + row < t.rows),
        )

    @T.macro
    def take_q(request, at, t):
        # Each warp two rows, of which it asks for everything before it uses any: memory's latency passes once.
        words = T.alloc_local((4 * _UNIT_WORDS,), "uint32")  # of each row latent columns, and rope columns
        first_row = t.tx // 32 * 2
        rope_unit = latent_steps + at.lane
        has_rope = at.lane < rope_steps
        for i in T.unroll(2):
            load_unit(words, i * 2, request, first_row + i, at.lane, True, t)
            load_unit(words, i * 2 + 1, request, first_row + i, rope_unit, has_rope, t)
        for i in T.unroll(2):
            factor = T.alloc_var(
                accum,
                init=T.call_extern(
                    accum,
                    "tilemla::store_latent",
                    place_of(first_row + i, at.lane, at),
                    T.address_of(words[i * 2 * _UNIT_WORDS]),
                ),
            )
            if at.lane == 0:
                t.q_factors[first_row + i] = factor
            if has_rope:
                T.call_extern(
                    "handle",
                    "tilemla::store_rope",
                    place_of(first_row + i, rope_unit, at),
                    T.address_of(words[(i * 2 + 1) * _UNIT_WORDS]),
                )
        T.fence_proxy_async()

    @T.macro
    def read_keys(raw, step, page, at):
        # 16 columns of each piece, of two pieces at once.
        for i in T.unroll(NUM_PIECES // 2):
            T.call_extern(
                "handle",
                "tilemla::read_rows",
                T.address_of(raw[i * A_REGISTERS]),
                page + at.keys + (i * 2 * PIECE_COLUMNS + step * K_STEP),
            )

    @T.macro
    def widen_keys(operand, place, raw):
        for k in T.unroll(PRODUCTS):
            for half in T.unroll(2):
                T.call_extern(
                    "handle",
                    "tilemla::widen_keys",
                    T.address_of(operand[place * BATCH + k * A_REGISTERS + half]),
                    raw[k * 2 + half],
                )

    @T.macro
    def score(scores, operand, raw, page, at):
        # To accumulator 0 the rope columns, to the others each piece of the latent ones, without its scale.
        for k in T.unroll(PRODUCTS):
            T.call_extern(
                "handle",
                "tilemla::read_rows",
                T.address_of(operand[k * A_REGISTERS]),
                page + at.rope + k * K_STEP * 2,
            )
        read_keys(raw, 0, page, at)
        multiply(
            "bf16",
            scores,
            0,
            1,
            operand,
            0,
            at.queries,
            lambda i: _offset_of_step(latent_steps + i),
            lambda i: 0,
            lambda i: T.Select(i != 0, 1, 0),
        )
        for step in range(_STEPS_PER_PIECE):
            place = (step + 1) % 2
            if step > 0:
                T.wait_wgmma(1)  # the operands of the batch before the last are free
            widen_keys(operand, place, raw)
            if step + 1 < _STEPS_PER_PIECE:
                read_keys(raw, step + 1, page, at)
            multiply(
                "fp16",
                scores,
                1,
                NUM_PIECES,
                operand,
                place,
                at.queries,
                lambda i, step=step: _offset_of_step(i * _STEPS_PER_PIECE + step),
                lambda i: i,
                lambda i, step=step: 1 if step > 0 else 0,
            )
        T.wait_wgmma(0)
        T.warpgroup_fence_operand(scores, 0, (1 + NUM_PIECES) * SCORES)

    @T.macro
    def add_pieces(scaled, scores, scales, q_factors, t):
        for e in T.unroll(SCORES):
            scaled[e] = 0
            for piece in T.unroll(NUM_PIECES):
                scaled[e] = scaled[e] + scores[(1 + piece) * SCORES + e] * scales[e % 4 // 2 * NUM_PIECES + piece]
            scaled[e] = (scores[e] + scaled[e] * q_factors[e // 4 * 2 + e % 2]) * t.softmax_scale_log2

    @T.macro
    def hide_scores(scaled, block, at, t):
        if needs_mask(block, BLOCK_N, at.seqlen, t.seq_len_q, t.window_left, t.window_right):
            for j in T.unroll(2):
                for v in T.unroll(2):
                    query = T.alloc_var("int32", init=T.truncdiv(t.tile[0] + at.column + j * 8 + v, t.group_size))
                    shift = T.alloc_var("int32", init=block * BLOCK_N + at.token)
                    first = T.alloc_var(
                        "int32",
                        init=first_key_of_query(query, at.seqlen, t.seq_len_q, t.window_left) - shift,
                    )
                    end = T.alloc_var(
                        "int32",
                        init=end_key_of_query(query, at.seqlen, t.seq_len_q, t.window_right) - shift,
                    )
                    for half in T.unroll(2):
                        scaled[j * 4 + half * 2 + v] = mask_score(
                            scaled[j * 4 + half * 2 + v], (half * 8 >= first) & (half * 8 < end)
                        )

    return SimpleNamespace(take_q=take_q, score=score, add_pieces=add_pieces, hide_scores=hide_scores)

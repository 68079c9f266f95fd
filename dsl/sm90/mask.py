"""Which keys of a block the rows of a score warpgroup see."""

import tilelang.language as T

from tilemla.dsl.attention import end_key_of_query, first_key_of_query, mask_score, needs_mask
from tilemla.dsl.schedule import BLOCK_N
from tilemla.dsl.sm90.tile import SCORES


@T.macro
def hide_scores(scores, request, block, row, column, t) -> None:
    """Make -inf of the scores whose keys a row's query does not see.

    ``scores`` are a thread's own elements of the 64x64 accumulator: groups of eight columns, of each two neighbouring
    ones from ``column`` on, of row ``row`` and then of row ``row + 8``.
    """
    if needs_mask(block, BLOCK_N, t.cache_seqlens[request], t.seq_len_q, t.window_left, t.window_right):
        for half in T.unroll(2):
            # the keys that the row's query sees, counted from this thread's first column
            query = T.alloc_var("int32", init=T.truncdiv(t.tile[0] + row + half * 8, t.group_size))
            shift = T.alloc_var("int32", init=block * BLOCK_N + column)
            first = T.alloc_var(
                "int32",
                init=first_key_of_query(query, t.cache_seqlens[request], t.seq_len_q, t.window_left) - shift,
            )
            end = T.alloc_var(
                "int32",
                init=end_key_of_query(query, t.cache_seqlens[request], t.seq_len_q, t.window_right) - shift,
            )
            for e in T.unroll(SCORES // 2):
                key = e // 2 * 8 + e % 2
                scores[e // 2 * 4 + half * 2 + e % 2] = mask_score(
                    scores[e // 2 * 4 + half * 2 + e % 2], (key >= first) & (key < end)
                )


@T.macro
def hide_unset(scores, first, count, bits) -> None:
    """Make -inf of ``count`` scores of a thread from ``first`` on, of whole groups of columns, whose bit is not set.

    ``bits`` are those of the groups' columns, from the thread's own first one on.
    """
    for e in T.unroll(count):
        scores[first + e] = mask_score(scores[first + e], T.bitwise_and(bits, T.shift_left(1, e // 4 * 8 + e % 2)) != 0)

"""Attention of one query's heads to the tokens that a list of indices names, in C: what decode and prefill share."""

from types import SimpleNamespace

import tilelang.language as T

from tilemla.dsl import attention
from tilemla.dsl.tile_cpu import BLOCK_N, make_tile_macros
from tilemla.dsl.tokens_cpu import make_token_reader


def make_chosen_macros(spec) -> SimpleNamespace:
    """The macros of a spec's tile, and how a block of a list is loaded and attended to.

    Returns
    -------
    SimpleNamespace
        `rows_of`, the macros of `make_tile_macros`. `alloc` makes a tile of theirs that also has `named` (64,), which
        tokens of the block there are, and `top_score` (block_m,), the largest unscaled score so far. `load_block` fills
        it with a block of a list, `attend_block` does its rows' steps.
    """
    rows_of = make_tile_macros(spec)
    read_token = make_token_reader(spec.kv_format, spec.dtype, spec.head_dim_qk)

    @T.macro
    def alloc():
        tile = rows_of.alloc()
        named = T.alloc_local((BLOCK_N,), "int32")
        index_read = T.alloc_local((1,), "int32")
        top_score = T.alloc_local((spec.block_m,), "float32")
        return SimpleNamespace(**vars(tile), named=named, index_read=index_read, top_score=top_score)

    @T.macro
    def load_block(tile, block, length, num_tokens, index_at, find_token):
        """Widen the tokens of a block of a list of `length` indices; for those that name none, nothing is read.

        `num_tokens` is how many there are to name; `index_at` gives the index at a position of the list, `find_token`
        the parts of the token of an index, as `make_token_reader` wants them.
        """
        for j in T.serial(BLOCK_N):
            tile.index_read[0] = -1
            if block * BLOCK_N + j < length:
                tile.index_read[0] = index_at(block * BLOCK_N + j)
            if (tile.index_read[0] >= 0) & (T.cast(tile.index_read[0], "int64") < num_tokens):
                tile.named[j] = 1
                read_token(tile.tokens, j, *find_token(tile.index_read[0]))
            else:
                tile.named[j] = 0
                rows_of.clear_token(tile, j)
        rows_of.transpose_tokens(tile)

    @T.macro
    def attend_block(tile, tile_rows, softmax_scale_log2, keep_top_score=False):
        for i in T.serial(tile_rows):
            rows_of.score_row(tile, i)
            for j in T.serial(BLOCK_N):
                tile.scores[i, j] = attention.mask_score(tile.scores[i, j], tile.named[j] != 0)
            if keep_top_score:
                for j in T.serial(BLOCK_N):
                    tile.top_score[i] = T.max(tile.top_score[i], tile.scores[i, j])
            rows_of.soften_row(tile, i, softmax_scale_log2)
            rows_of.accumulate_row(tile, i)

    return SimpleNamespace(rows_of=rows_of, alloc=alloc, load_block=load_block, attend_block=attend_block)

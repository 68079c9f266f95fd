"""A tile of queries against a block of tokens in C: one text for all that attends on a CPU.

TileLang's ``c`` target runs the grid as nested loops and has neither fragments nor shared memory: everything lies in
local fp32 buffers. A block of 64 tokens is gathered and widened once per query tile, keys transposed so that the score
loop runs over contiguous tokens and values as they are, so that the output loop runs over contiguous channels: the C
compiler vectorises both without reordering a sum.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl import attention, combine, schedule
from tilemla.dsl.tokens_cpu import narrow

BLOCK_N = schedule.BLOCK_N
# Terms added to an element of a tile each time that it is in a register.
_UNROLL = 8


def _dot_terms(left, right) -> Any:
    """Sum of products of two short lists of expressions, in order."""
    total = left[0] * right[0]
    for a, b in zip(left[1:], right[1:], strict=True):
        total = total + a * b
    return total


def make_tile_macros(spec, out_dtype=None) -> SimpleNamespace:
    """The macros of a spec's tile.

    Parameters
    ----------
    spec : KernelSpec
        With ``arch="cpu"``.
    out_dtype : str, optional
        That of the output; the spec's by default.

    Returns
    -------
    SimpleNamespace
        `alloc` makes a tile: query (block_m, head_dim_qk), tokens (64, head_dim_qk), keys (head_dim_qk, 64), scores
        (block_m, 64), acc (block_m, head_dim_v), row_max and row_sum (block_m,), and moved (2,), scratch. For its row
        i, `clear_row`, `score_row`, `soften_row` and `accumulate_row` are the steps of attention; `clear_token` and
        `transpose_tokens` help to load a block. `write_row`, `write_partial_row` and `merge_row` write what came out,
        at `where`: the indices of a row of the results, (request, KV head, row) or however the caller's tensors are.
    """
    block_m, head_dim_qk, head_dim_v = spec.block_m, spec.head_dim_qk, spec.head_dim_v
    dtype = out_dtype or spec.dtype

    @T.macro
    def alloc():
        query = T.alloc_local((block_m, head_dim_qk), "float32")
        tokens = T.alloc_local((BLOCK_N, head_dim_qk), "float32")
        keys = T.alloc_local((head_dim_qk, BLOCK_N), "float32")
        scores = T.alloc_local((block_m, BLOCK_N), "float32")
        acc = T.alloc_local((block_m, head_dim_v), "float32")
        row_max = T.alloc_local((block_m,), "float32")
        row_sum = T.alloc_local((block_m,), "float32")
        moved = T.alloc_local((2,), "float32")
        return SimpleNamespace(
            query=query,
            tokens=tokens,
            keys=keys,
            scores=scores,
            acc=acc,
            row_max=row_max,
            row_sum=row_sum,
            moved=moved,
        )

    @T.macro
    def clear_row(tile, i):
        tile.row_max[i] = attention.RUNNING_MAX_START
        tile.row_sum[i] = 0.0
        for d in T.serial(head_dim_v):
            tile.acc[i, d] = 0.0

    @T.macro
    def clear_token(tile, j):
        for d in T.serial(head_dim_qk):
            tile.tokens[j, d] = 0.0

    @T.macro
    def transpose_tokens(tile):
        for j in T.serial(BLOCK_N // _UNROLL):
            for d in T.serial(head_dim_qk):
                for u in T.serial(_UNROLL):
                    tile.keys[d, j * _UNROLL + u] = tile.tokens[j * _UNROLL + u, d]

    @T.macro
    def score_row(tile, i):
        for j in T.serial(BLOCK_N):
            tile.scores[i, j] = 0.0
        for d in T.serial(head_dim_qk // _UNROLL):
            for j in T.serial(BLOCK_N):
                tile.scores[i, j] = tile.scores[i, j] + _dot_terms(
                    [tile.query[i, d * _UNROLL + u] for u in range(_UNROLL)],
                    [tile.keys[d * _UNROLL + u, j] for u in range(_UNROLL)],
                )

    @T.macro
    def soften_row(tile, i, softmax_scale_log2):
        """Scores to probabilities, with the online softmax's step on maximum, sum and accumulator.

        Scores are scaled in memory: fused with the subtraction, a product would keep bits that the maximum has lost,
        and the exponential of those of a very large score is infinite, or 0.
        """
        tile.moved[0] = -T.infinity("float32")
        for j in T.serial(BLOCK_N):
            tile.scores[i, j] = tile.scores[i, j] * softmax_scale_log2
        for j in T.serial(BLOCK_N):
            tile.moved[0] = T.max(tile.moved[0], tile.scores[i, j])
        tile.moved[0] = attention.advance_max(tile.row_max[i], tile.moved[0])
        if tile.moved[0] != tile.row_max[i]:
            tile.moved[1] = attention.rescale_factor(tile.row_max[i], tile.moved[0])
            tile.row_max[i] = tile.moved[0]
            tile.row_sum[i] = tile.row_sum[i] * tile.moved[1]
            for d in T.serial(head_dim_v):
                tile.acc[i, d] = tile.acc[i, d] * tile.moved[1]
        for j in T.serial(BLOCK_N):
            tile.scores[i, j] = attention.probability_of_scaled(tile.scores[i, j], tile.row_max[i])
            tile.row_sum[i] = tile.row_sum[i] + tile.scores[i, j]

    @T.macro
    def accumulate_row(tile, i):
        for j in T.serial(BLOCK_N // _UNROLL):
            for d in T.serial(head_dim_v):
                tile.acc[i, d] = tile.acc[i, d] + _dot_terms(
                    [tile.scores[i, j * _UNROLL + u] for u in range(_UNROLL)],
                    [tile.tokens[j * _UNROLL + u, d] for u in range(_UNROLL)],
                )

    @T.macro
    def write_row(results, where, acc, i, row_sum, row_max):
        """Normalise row `i` of an accumulator and write it, rounded, beside its log-sum-exp.

        `results` holds out, softmax_lse, lse_scale, has_sink, sink_at, which gives the sink of a row, and value_scale,
        what values are to be multiplied by, or None.
        """
        results.softmax_lse[where] = attention.final_lse(row_sum, row_max, results.lse_scale)
        factor = T.alloc_local((1,), "float32")
        factor[0] = attention.inverse_sum(row_sum)
        if results.has_sink != 0:
            factor[0] = attention.inverse_sum(row_sum, attention.sink_share(row_max, results.sink_at(*where)))
        if results.value_scale is not None:
            factor[0] = factor[0] * results.value_scale
        for d in T.serial(head_dim_v):
            results.out[(*where, d)] = narrow(acc[i, d] * factor[0], dtype)

    @T.macro
    def write_partial_row(out_accum, lse_accum_log2, where, tile, i):
        lse_accum_log2[where] = attention.partial_lse_log2(tile.row_sum[i], tile.row_max[i])
        tile.moved[0] = attention.inverse_sum(tile.row_sum[i])
        for d in T.serial(head_dim_v):
            out_accum[(*where, d)] = tile.acc[i, d] * tile.moved[0]

    @T.macro
    def merge_row(num_splits, out_accum, lse_accum_log2, results, where):
        """Merge the partial results of a row at `where`, whose first index is the request's."""
        merged = T.alloc_local((1, head_dim_v), "float32")
        lse_max = T.alloc_local((1,), "float32")
        weight = T.alloc_local((1,), "float32")
        weight_sum = T.alloc_local((1,), "float32")
        slot = num_splits[where[0]]
        count = combine.count_splits(num_splits, where[0])
        lse_max[0] = combine.start_max()
        weight_sum[0] = 0.0
        for d in T.serial(head_dim_v):
            merged[0, d] = 0.0
        for split in T.serial(count):
            lse_max[0] = combine.advance_max(lse_max[0], lse_accum_log2[(slot + split, *where[1:])])
        for split in T.serial(count):
            weight[0] = combine.split_weight(lse_accum_log2[(slot + split, *where[1:])], lse_max[0])
            weight_sum[0] = weight_sum[0] + weight[0]
            for d in T.serial(head_dim_v):
                merged[0, d] = merged[0, d] + weight[0] * out_accum[(slot + split, *where[1:], d)]
        write_row(results, where, merged, 0, weight_sum[0], lse_max[0])

    return SimpleNamespace(
        alloc=alloc,
        clear_row=clear_row,
        clear_token=clear_token,
        transpose_tokens=transpose_tokens,
        score_row=score_row,
        soften_row=soften_row,
        accumulate_row=accumulate_row,
        write_row=write_row,
        write_partial_row=write_partial_row,
        merge_row=merge_row,
    )

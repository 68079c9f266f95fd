"""Scalar logic of attention over a paged cache, one text for every target.

Plain Python functions over TIR expressions: they serve in a fragment under ``T.Parallel`` as well as in a serial loop
over a local buffer. Scores are in log2 units: ``dot(q, k) * softmax_scale_log2`` with
``softmax_scale_log2 = softmax_scale * log2(e)``, so that every exponential is an ``exp2``. A row of a query tile is
``query * group_size + head``: the ``group_size = h_q // h_k`` heads that share a KV head lie side by side.
"""

from typing import Any

import tilelang.language as T

# Where the running maximum starts: finite, so that "score - maximum" is never inf - inf, and below every score.
RUNNING_MAX_START = -1e30

# The running maximum moves only when it is exceeded by more than this (log2 units), which spares most rescaling of the
# accumulator. A probability is then at most 2**8, far inside fp32, bf16 and fp16.
LAZY_MAX_MARGIN_LOG2 = 8.0


def page_index(block_table, request, block) -> Any:
    """The page that holds `block` of `request`. Only blocks below ``count_blocks`` may be asked for."""
    return block_table[request, block]


def is_visible(key, cache_seqlen, row, group_size, seq_len_q, window_right) -> Any:
    """Whether a row attends to `key`, counted from the start of the cache, bool.

    Causal masking (`window_right` is 0; -1 is none) is aligned to the end of the cache: query i sees the keys below
    ``cache_seqlen - seq_len_q + i + 1``. With ``i = row // group_size`` that is
    ``(key - cache_seqlen + seq_len_q) * group_size <= row``, which needs no division. Ask only about keys of a block
    that `needs_mask`: further back the product may overflow.
    """
    causal = window_right + 1
    seq_len = 1 + causal * (seq_len_q - 1)
    step = 1 + causal * (group_size - 1)
    return (key - cache_seqlen + seq_len) * step <= causal * row


def needs_mask(block, block_n, cache_seqlen, seq_len_q, window_right) -> Any:
    """Whether some row does not see some key of `block`: true of the last blocks of a sequence alone."""
    return (block + 1) * block_n > cache_seqlen - (window_right + 1) * (seq_len_q - 1)


def mask_score(score, visible) -> Any:
    """The score, or -inf where the key is not visible."""
    return T.if_then_else(visible, score, -T.infinity("float32"))


def advance_max(running_max, block_max) -> Any:
    """The running maximum after a block whose largest scaled score is `block_max` (-inf if nothing is visible)."""
    return T.if_then_else(block_max > running_max + LAZY_MAX_MARGIN_LOG2, block_max, running_max)


def rescale_factor(old_max, new_max) -> Any:
    """What the sum and the accumulator are multiplied by when the running maximum moves; 1 when it does not."""
    return T.exp2(old_max - new_max)


def probability(score, softmax_scale_log2, running_max) -> Any:
    """The unnormalised probability of an unscaled score, at most 2**8; 0 for a masked one.

    The scale is positive: a masked score stays -inf, and the largest score is the largest scaled one.
    """
    return T.exp2(score * softmax_scale_log2 - running_max)


def inverse_sum(row_sum) -> Any:
    """What normalises the accumulator; 0 for a row that saw no key, so that its output is 0."""
    return T.if_then_else(row_sum > 0.0, 1.0 / row_sum, 0.0)


def partial_lse_log2(row_sum, running_max) -> Any:
    """Base-2 log-sum-exp of a split; -inf when the row saw no key in it, so that the split weighs nothing."""
    return T.if_then_else(row_sum > 0.0, T.log2(row_sum) + running_max, -T.infinity("float32"))


def final_lse(row_sum, running_max, lse_scale) -> Any:
    """Log-sum-exp of a row; +inf when the row saw no key, as FlashMLA has it.

    `lse_scale` is the log of 2 in the base that is wanted: ln 2 for the natural one, 1 for base 2.
    """
    return T.if_then_else(row_sum > 0.0, (T.log2(row_sum) + running_max) * lse_scale, T.infinity("float32"))

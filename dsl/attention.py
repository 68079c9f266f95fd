"""Scalar logic of attention over a paged cache, one text for every target.

Plain Python functions over TIR expressions: they serve in a fragment under ``T.Parallel`` as well as in a serial loop
over a local buffer. Scores are in log2 units: ``dot(q, k) * softmax_scale_log2`` with
``softmax_scale_log2 = softmax_scale * log2(e)``, so that every exponential is an ``exp2``. A row of a query tile is
``query * group_size + head``: the ``group_size = h_q // h_k`` heads that share a KV head lie side by side.
"""

import math
from typing import Any

import tilelang.language as T

# Where the running maximum starts: finite, so that "score - maximum" is never inf - inf, and below every score.
RUNNING_MAX_START = -1e30

# The running maximum moves only when it is exceeded by more than this (log2 units), which spares most rescaling of the
# accumulator. A probability is then at most 2**8, far inside fp32, bf16 and fp16.
LAZY_MAX_MARGIN_LOG2 = 8.0

# The least factor of scores: the smallest normal float32.
LEAST_SCALE = 2.0**-126

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def page_index(block_table, request, block) -> Any:
    """The page that holds `block` of `request`. Only blocks below ``count_blocks`` may be asked for."""
    return block_table[request, block]


def first_visible_key(cache_seqlen, seq_len_q, window_left) -> Any:
    """The first key that some query of a request sees, int32; those before it are never read.

    `window_left` is how far back from its own position, ``cache_seqlen - seq_len_q + i``, query i sees: -1 is all the
    way, else it is at most 2**30.
    """
    return T.if_then_else(window_left >= 0, T.max(cache_seqlen - seq_len_q - window_left, 0), 0)


def first_visible_block(cache_seqlen, seq_len_q, window_left, block_n) -> Any:
    """The block of ``first_visible_key``, int32; 0 for an empty sequence, else one of its blocks."""
    return T.shift_right(first_visible_key(cache_seqlen, seq_len_q, window_left), block_n.bit_length() - 1)


def first_key_of_query(query, cache_seqlen, seq_len_q, window_left) -> Any:
    """The first key that a query sees, int32; negative where its window begins before the cache does.

    Query i is at position ``p = cache_seqlen - seq_len_q + i`` and sees the keys from ``p - window_left`` to
    ``p + window_right``, both inclusive; -1 is no bound, and 0 on the right is causal masking. A row of a tile belongs
    to query ``row // group_size``. Both bounds are found once for a row of a block that `needs_mask`.
    """
    return T.if_then_else(window_left >= 0, cache_seqlen - seq_len_q + query - window_left, 0)


def end_key_of_query(query, cache_seqlen, seq_len_q, window_right) -> Any:
    """One past the last key that a query sees, int32; 0 or less where it sees none."""
    hidden = T.if_then_else(window_right >= 0, T.max(seq_len_q - query - 1 - window_right, 0), 0)
    return cache_seqlen - hidden


def needs_mask(block, block_n, cache_seqlen, seq_len_q, window_left, window_right) -> Any:
    """Whether some query does not see some key of `block`: true near the ends of a sequence and of the window alone."""
    ends_in_block = (block + 1) * block_n > end_key_of_query(0, cache_seqlen, seq_len_q, window_right)
    first_key = first_key_of_query(seq_len_q - 1, cache_seqlen, seq_len_q, window_left)
    return ends_in_block | (block * block_n < first_key)


def mask_score(score, visible) -> Any:
    """The score, or -inf where the key is not visible."""
    return T.if_then_else(visible, score, -T.infinity("float32"))


def advance_max(running_max, block_max) -> Any:
    """The running maximum after a block whose largest scaled score is `block_max` (-inf if nothing is visible)."""
    return T.if_then_else(block_max > running_max + LAZY_MAX_MARGIN_LOG2, block_max, running_max)


def descale_scores(softmax_scale_log2, descale_q, descale_k) -> Any:
    """The factor of scores whose queries and keys are still to be multiplied by scales of their own.

    Positive where these are 0, too: a masked score has to stay -inf.
    """
    return T.max(softmax_scale_log2 * descale_q * descale_k, LEAST_SCALE)


def rescale_factor(old_max, new_max) -> Any:
    """What the sum and the accumulator are multiplied by when the running maximum moves; 1 when it does not."""
    return T.exp2(old_max - new_max)


def probability(score, softmax_scale_log2, running_max) -> Any:
    """The unnormalised probability of an unscaled score, at most 2**8; 0 for a masked one.

    The scale is positive: a masked score stays -inf, and the largest score is the largest scaled one.
    """
    return probability_of_scaled(score * softmax_scale_log2, running_max)


def probability_of_scaled(scaled_score, running_max) -> Any:
    """The same of a score that was scaled before."""
    return T.exp2(scaled_score - running_max)


def inverse_sum(row_sum, sink_share=0.0) -> Any:
    """What normalises the accumulator; 0 for a row that saw no key, so that its output is 0."""
    return T.if_then_else(row_sum > 0.0, 1.0 / (row_sum + sink_share), 0.0)


def sink_share(running_max, sink) -> Any:
    """What an attention sink adds to the sum that the outputs are divided by, beside keys of this running maximum.

    Outputs then are those without it times ``exp(lse) / (exp(lse) + exp(sink))``. `sink` is a natural logarithm; with
    -inf nothing changes, bit for bit, and +inf leaves 0.
    """
    return T.exp2(sink * LOG2_E - running_max)


def partial_lse_log2(row_sum, running_max) -> Any:
    """Base-2 log-sum-exp of a split; -inf when the row saw no key in it, so that the split weighs nothing."""
    return T.if_then_else(row_sum > 0.0, T.log2(row_sum) + running_max, -T.infinity("float32"))


def final_lse(row_sum, running_max, lse_scale) -> Any:
    """Log-sum-exp of a row; +inf when the row saw no key, as FlashMLA has it.

    `lse_scale` is the log of 2 in the base that is wanted: ln 2 for the natural one, 1 for base 2.
    """
    return T.if_then_else(row_sum > 0.0, (T.log2(row_sum) + running_max) * lse_scale, T.infinity("float32"))

"""Scalar logic of merging the partial results of a split request, one text for every target.

With ``lse_log2[i]`` the base-2 log-sum-exp of split i of a row and ``out[i]`` its normalised output, the merged output
is ``sum(2**(lse_log2[i] - max) * out[i]) / sum(2**(lse_log2[i] - max))``. The end of a row is the same as that of a
request that was not split: ``attention.inverse_sum`` and ``attention.final_lse`` of the sum of weights and the maximum.
"""

from typing import Any

import tilelang.language as T

from tilemla.dsl.attention import RUNNING_MAX_START


def count_splits(num_splits, request) -> Any:
    """How many pieces the schedule cut `request` into, int32; partials exist when it is more than 1."""
    return num_splits[request + 1] - num_splits[request]


def needs_combine(num_splits, request) -> Any:
    """Whether the result of `request` has to be merged from partials, bool."""
    return count_splits(num_splits, request) > 1


def start_max() -> Any:
    """Where the maximum over splits starts: finite, so that a row without any key gives weights 0, not NaN."""
    return RUNNING_MAX_START


def advance_max(running_max, lse_log2) -> Any:
    """The largest log-sum-exp so far."""
    return T.max(running_max, lse_log2)


def split_weight(lse_log2, max_lse_log2) -> Any:
    """The unnormalised weight of a split, 0 to 1; 0 for a split in which the row saw no key."""
    return T.exp2(lse_log2 - max_lse_log2)

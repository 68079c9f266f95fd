"""What is right: decode in float64, how far a result may be from it, and what makes a schedule a schedule."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """An element passes by its absolute or by its relative error; the cosine difference is that of the whole tensor.

    `unit_roundoff` is that of the dtype in which probabilities are multiplied with values.
    """

    out_abs: float
    out_rel: float
    out_cosine_difference: float
    lse_abs: float
    lse_rel: float
    unit_roundoff: float


# FlashMLA's, in tests/test_flash_mla_dense_decoding.py.
TOLERANCES = {
    torch.bfloat16: Tolerance(8e-4, 2.01 / 128, 5e-6, 1e-6, 8.01 / 65536, 2.0**-9),
    torch.float16: Tolerance(8e-4, 2.01 / 128, 5e-6, 1e-6, 8.01 / 65536, 2.0**-11),
}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The right result in float64, beside the magnitudes that rounding errors scale with.

    out, out_magnitude : (batch_size, seq_len_q, num_heads_q, head_dim_v)
        The output, and the same sum over absolute values.
    lse, score_magnitude : (batch_size, num_heads_q, seq_len_q)
        The natural log-sum-exp, and a bound on the absolute products that a score sums.
    """

    out: torch.Tensor
    out_magnitude: torch.Tensor
    lse: torch.Tensor
    score_magnitude: torch.Tensor


def decode_reference(
    q,
    k_cache,
    block_table,
    cache_seqlens,
    head_dim_v=512,
    *,
    causal=False,
    softmax_scale=None,
    window_size=(-1, -1),
    attn_sink=None,
):
    """Attend by walking block_table; slots and table entries past cache_seqlens or before the window are not touched.

    Parameters are those of ``flash_mla_with_kvcache``, on any device. Returns a Reference on that device.
    """
    left, right = window_size
    batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
    _, page_block_size, num_heads_k, _ = k_cache.shape
    group = num_heads_q // num_heads_k
    scale = head_dim_qk**-0.5 if softmax_scale is None else softmax_scale
    like = dict(dtype=torch.float64, device=q.device)
    out = torch.zeros((batch_size, seq_len_q, num_heads_q, head_dim_v), **like)
    out_magnitude = torch.zeros_like(out)
    lse = torch.full((batch_size, num_heads_q, seq_len_q), math.inf, **like)
    score_magnitude = torch.zeros_like(lse)
    for request, length in enumerate(cache_seqlens.tolist()):
        if length == 0:
            continue
        begin = max(length - seq_len_q - left, 0) // page_block_size * page_block_size if left >= 0 else 0
        pages = block_table[request, begin // page_block_size : -(-length // page_block_size)].long()
        # (num_heads_k, length - begin, head_dim_qk)
        keys = k_cache[pages].flatten(0, 1)[: length - begin].double().transpose(0, 1)
        # Rows of a KV head are (query, head of the group), as in (seq_len_q, num_heads_k, group, head_dim_qk).
        queries = q[request].double().view(seq_len_q, num_heads_k, group, head_dim_qk).transpose(0, 1).flatten(1, 2)
        scores = queries @ keys.transpose(1, 2) * scale  # (num_heads_k, seq_len_q * group, length - begin)
        key = torch.arange(begin, length, device=q.device)
        query = torch.arange(seq_len_q, device=q.device).repeat_interleave(group)[:, None]
        distance = key - (length - seq_len_q + query)
        if causal:
            scores.masked_fill_(distance > 0, -math.inf)
        if right >= 0:
            scores.masked_fill_(distance > right, -math.inf)
        if left >= 0:
            scores.masked_fill_(distance < -left, -math.inf)
        row_lse = scores.logsumexp(-1)
        sees_a_key = torch.isfinite(row_lse)
        probabilities = torch.exp(scores - torch.where(sees_a_key, row_lse, 0.0)[..., None])
        values = keys[..., :head_dim_v]
        magnitude = abs(scale) * queries.norm(dim=-1) * keys.norm(dim=-1).amax(-1, keepdim=True)

        def heads_first(rows):
            return rows.view(num_heads_k, seq_len_q, group).transpose(1, 2).reshape(num_heads_q, seq_len_q)

        def heads_last(rows):
            rows = rows.view(num_heads_k, seq_len_q, group, head_dim_v).transpose(0, 1)
            return rows.reshape(seq_len_q, num_heads_q, head_dim_v)

        if attn_sink is not None:
            sink = attn_sink.double().view(num_heads_k, 1, group).expand(-1, seq_len_q, -1).flatten(1)
            probabilities *= torch.where(sees_a_key, torch.sigmoid(row_lse - sink), 0.0)[..., None]
        out[request] = heads_last(probabilities @ values)
        out_magnitude[request] = heads_last((probabilities.float() @ values.abs().float()).double())
        lse[request] = heads_first(torch.where(sees_a_key, row_lse, math.inf))
        score_magnitude[request] = heads_first(magnitude)
    return Reference(out, out_magnitude, lse, score_magnitude)


def chosen_reference(q, lists, head_dim_v=512, *, softmax_scale=None, attn_sink=None):
    """Attend to the tokens that lists of indices name; a token counts as often as it is named.

    Parameters
    ----------
    q : Tensor, (queries, num_heads_q, head_dim_qk)
    lists : list of (tokens, indices, lengths)
        Tokens ``(num_tokens, head_dim_qk)`` of any dtype, of which those that no index names may hold anything; indices
        ``(queries, topk)``, of which those that are negative or not below num_tokens name none; how many of them count,
        ``(queries,)``, or None.

    Returns
    -------
    (Reference, Tensor)
        With out ``(queries, num_heads_q, head_dim_v)`` and lse ``(queries, num_heads_q)``, and the largest scaled score
        ``(queries, num_heads_q)``, -inf where nothing is named.
    """
    queries, num_heads_q, head_dim_qk = q.shape
    scale = head_dim_qk**-0.5 if softmax_scale is None else softmax_scale
    like = dict(dtype=torch.float64, device=q.device)
    out = torch.zeros((queries, num_heads_q, head_dim_v), **like)
    out_magnitude = torch.zeros_like(out)
    lse = torch.full((queries, num_heads_q), math.inf, **like)
    score_magnitude, top = torch.zeros_like(lse), torch.full_like(lse, -math.inf)
    for i in range(queries):
        named = []
        for tokens, indices, lengths in lists:
            counted = indices[i] if lengths is None else indices[i, : max(int(lengths[i]), 0)]
            named.append(tokens[counted[(counted >= 0) & (counted < len(tokens))].long()].double())
        keys = torch.cat(named)
        if not len(keys):
            continue
        scores = q[i].double() @ keys.T * scale  # (num_heads_q, named tokens)
        lse[i], top[i] = scores.logsumexp(-1), scores.amax(-1)
        probabilities = scores.softmax(-1)  # not from lse, which loses ln 2 beside a very large score
        if attn_sink is not None:
            probabilities *= torch.sigmoid(lse[i] - attn_sink.double())[:, None]
        out[i] = probabilities @ keys[:, :head_dim_v]
        out_magnitude[i] = probabilities @ keys[:, :head_dim_v].abs()
        score_magnitude[i] = abs(scale) * q[i].double().norm(dim=-1) * keys.norm(dim=-1).amax()
    return Reference(out, out_magnitude, lse, score_magnitude), top


def reference_of(inputs, *, causal=False, softmax_scale=None, window=(-1, -1)):
    """`decode_reference` of a case's inputs: anything with q, k_cache, block_table and cache_seqlens."""
    return decode_reference(
        inputs.q,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        causal=causal,
        softmax_scale=softmax_scale,
        window_size=window,
        attn_sink=getattr(inputs, "attn_sink", None),
    )


def cosine_difference(actual, expected):
    """``1 - 2<a, e> / (<a, a> + <e, e>)``; 0 where there is nothing to compare."""
    if not expected.numel() or float((expected * expected).sum()) < 1e-12:
        return 0.0
    return 1.0 - float(2 * (actual * expected).sum() / (actual * actual + expected * expected).sum())


def _check_elements(name, actual, expected, abs_tolerance, rel_tolerance):
    error = (actual - expected).abs()
    # Negated, so that a NaN fails.
    passes = (error < abs_tolerance) | (error < rel_tolerance * (expected.abs() + 1e-6))
    if not bool(passes.all()):
        index = tuple(torch.nonzero(~passes)[0].tolist())
        raise AssertionError(
            f"{name}: {int((~passes).sum())} of {passes.numel()} elements are wrong; {name}{list(index)} is "
            f"{float(actual[index])}, expected {float(expected[index])}"
        )


def check_out(out, reference, dtype=None, score_roundoff=0.0):
    """Raise AssertionError unless `out` is right for inputs of its dtype (or `dtype`).

    `score_roundoff` is that of the sums that scores are, where it is coarser than float32's.
    """
    tolerance = TOLERANCES[dtype or out.dtype]
    assert out.shape == reference.out.shape, f"out has shape {tuple(out.shape)}, not {tuple(reference.out.shape)}"
    actual = out.double()
    # FlashMLA's bound is made for values of about 0.1. Larger ones may cancel in a sum whose terms were each rounded
    # to the dtype, as probabilities are before they enter a tensor core: once in the sum, once in its norm.
    # A score's error is one of its probability, and of their sum.
    score_error = score_roundoff * reference.score_magnitude
    score_error = (score_error.transpose(1, 2) if score_error.dim() == 3 else score_error)[..., None]
    abs_tolerance = (2 * (tolerance.unit_roundoff + score_error) * reference.out_magnitude).clamp(min=tolerance.out_abs)
    _check_elements("out", actual, reference.out, abs_tolerance, tolerance.out_rel)
    difference = cosine_difference(actual, reference.out)
    bound = tolerance.out_cosine_difference + float(score_error.square().max() if score_error.numel() else 0)
    assert abs(difference) < bound, f"out: cosine difference {difference}"


def check_lse(lse, reference, dtype, score_roundoff=0.0):
    """Raise AssertionError unless `lse` is right for inputs of `dtype`: +inf exactly where no key is seen.

    `score_roundoff` is that of the sums that scores are, where it is coarser than float32's.
    """
    tolerance = TOLERANCES[dtype]
    assert lse.dtype == torch.float32, f"lse is {lse.dtype}, not float32"
    assert lse.shape == reference.lse.shape, f"lse has shape {tuple(lse.shape)}, not {tuple(reference.lse.shape)}"
    actual, expected = lse.double(), reference.lse
    is_empty = torch.isposinf(expected)
    assert torch.equal(torch.isposinf(actual), is_empty), "lse must be +inf for the rows that see no key, and no others"
    # Where terms of a score cancel, nobody can know it better than to a rounding of those terms.
    abs_tolerance = (max(score_roundoff, 2.0**-23) * reference.score_magnitude).clamp(min=tolerance.lse_abs)
    actual, expected = (torch.where(is_empty, 0.0, tensor) for tensor in (actual, expected))
    _check_elements("lse", actual, expected, abs_tolerance, tolerance.lse_rel)


def check_result(out, lse, reference, dtype=None, score_roundoff=0.0):
    """Raise AssertionError unless both results of a decode call are right."""
    check_out(out, reference, dtype, score_roundoff)
    check_lse(lse, reference, dtype or out.dtype, score_roundoff)


def read_order(tile_scheduler_metadata, batch_size):
    """The requests by place of a schedule, NumPy (num_sm_parts, 8) int32, and its first place."""
    rows = np.ascontiguousarray(tile_scheduler_metadata, dtype="<i4")
    if not (rows[:, 0] >= 2**30).any():
        assert not rows[:, 7].any(), "an order, but places that are requests"
        return list(range(batch_size)), 0
    order = rows[:, 7].tobytes()  # four places a row
    assert sorted(order[:batch_size]) == list(range(batch_size)), f"not an order of {batch_size}: {list(order)}"
    assert not any(order[batch_size:]), f"an order of more than {batch_size}: {list(order)}"
    return list(order[:batch_size]), 2**30


def check_schedule(tile_scheduler_metadata, num_splits, cache_seqlens, block_n=64, first_blocks=None):
    """Raise AssertionError unless a schedule covers every block of every request exactly once and says so.

    With `first_blocks` a request's blocks are those from there on. Takes NumPy int32 arrays ``(num_sm_parts, 8)``,
    ``(batch_size + 1,)`` or longer, and ``(batch_size,)``; returns the pieces, a list per request of
    ``(part, begin_block, end_block)``.
    """
    batch_size = len(cache_seqlens)
    num_blocks = [-(-max(int(length), 0) // block_n) for length in cache_seqlens]
    first_blocks = first_blocks or [0] * batch_size
    pieces = [[] for _ in range(batch_size)]
    split_flags = [[] for _ in range(batch_size)]
    rows = np.asarray(tile_scheduler_metadata)
    order, first_place = read_order(rows, batch_size)
    for part, row in enumerate(rows.tolist()):
        begin, end_inclusive, begin_block, end_block, begin_split, first_is_split, last_is_split, _ = row
        where = f"part {part}: {row}"
        if begin > end_inclusive:
            idle = [batch_size, batch_size - 1, 0, 0, 0, 0, 0]
            assert row[:7] == idle, f"{where} is idle, but not written as such"
            continue
        begin, end_inclusive = begin - first_place, end_inclusive - first_place
        assert 0 <= begin <= end_inclusive < batch_size, where
        assert begin < end_inclusive or first_is_split == last_is_split, f"{where}: one request, two answers"
        before = len(pieces[order[begin]])
        assert begin_split == before, f"{where}: the request has {before} pieces before it"
        for place in range(begin, end_inclusive + 1):
            request = order[place]
            first = begin_block if place == begin else first_blocks[request]
            end = end_block if place == end_inclusive else num_blocks[request]
            pieces[request].append((part, first, end))
            flag = first_is_split if place == begin else last_is_split if place == end_inclusive else 0
            split_flags[request].append(flag)
    total = 0
    for request in range(batch_size):
        where = f"request {request} of {num_blocks[request]} blocks is cut into {pieces[request]}"
        assert pieces[request], where
        at = first_blocks[request]
        for _, first, end in pieces[request]:
            assert first == at and (end > first or num_blocks[request] == 0), where
            at = end
        assert at == num_blocks[request], where
        count = len(pieces[request])
        assert all(flag == (count > 1) for flag in split_flags[request]), f"{where}, flags {split_flags[request]}"
        assert num_splits[request] == total, f"num_splits[{request}] is {num_splits[request]}, expected {total}"
        total += count
    assert num_splits[batch_size] == total, f"num_splits[{batch_size}] is {num_splits[batch_size]}, expected {total}"
    return pieces

"""Call a module's kernels themselves: any number of parts, outputs and partial buffers full of NaN."""

from __future__ import annotations

import dataclasses
import math

import torch

from cases import HEAD_DIM_V, Inputs
from schedules import spread_schedule
from tilemla.launch import kernels_for

LN_2 = math.log(2.0)


@dataclasses.dataclass
class Result:
    """out (b, s_q, h_q, head_dim_v), lse (b, h_q, s_q), num_splits (b + 1,)."""

    out: torch.Tensor
    lse: torch.Tensor
    num_splits: torch.Tensor


def fold_heads(q, num_heads_k):
    """(b, s_q, h_q, d) to (b, h_k, s_q * group, d), contiguous."""
    batch_size, seq_len_q, num_heads_q, head_dim = q.shape
    group = num_heads_q // num_heads_k
    q = q.view(batch_size, seq_len_q, num_heads_k, group, head_dim).transpose(1, 2)
    return q.reshape(batch_size, num_heads_k, seq_len_q * group, head_dim)


def unfold_heads(out, seq_len_q):
    """(b, h_k, s_q * group, d) to (b, s_q, h_q, d)."""
    batch_size, num_heads_k, rows, head_dim = out.shape
    out = out.view(batch_size, num_heads_k, seq_len_q, rows // seq_len_q, head_dim).transpose(1, 2)
    return out.reshape(batch_size, seq_len_q, -1, head_dim)


def kernel_window(window, causal, seq_len_q):
    """The window of a call as the kernels take it."""
    left, right = window
    bounds = [bound for bound in (right, 0 if causal else -1) if 0 <= bound < seq_len_q - 1]
    return left, min(bounds, default=-1)


def decode(
    inputs: Inputs,
    *,
    causal=False,
    softmax_scale=None,
    num_sm_parts=8,
    window=(-1, -1),
    schedule=None,
    lse_scale=LN_2,
) -> Result:
    """Decode with a schedule, or as many splits as there can be. What the kernels leave unwritten stays NaN.

    A call that the plain program serves goes to it, as from the API.
    """
    q, k_cache = inputs.q, inputs.k_cache
    batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
    _, page_block_size, num_heads_k, _ = k_cache.shape
    rows = seq_len_q * num_heads_q // num_heads_k
    kernels = kernels_for(q.device, q.dtype, head_dim_qk, HEAD_DIM_V, page_block_size)
    int32 = dict(dtype=torch.int32, device=q.device)
    if schedule is None:
        schedule = spread_schedule(inputs.cache_seqlens.tolist(), num_sm_parts)
    metadata, num_splits = (torch.as_tensor(array).to(**int32) for array in schedule)

    def poisoned(*shape, dtype=torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype, device=q.device)

    max_num_splits = batch_size + metadata.shape[0]
    out = poisoned(batch_size, num_heads_k, rows, HEAD_DIM_V, dtype=q.dtype)
    lse = poisoned(batch_size, num_heads_k, rows)
    scale = head_dim_qk**-0.5 if softmax_scale is None else softmax_scale
    left, right = kernel_window(window, causal, seq_len_q)
    has_sink = inputs.attn_sink is not None
    if left >= 0 or has_sink:
        function, bounds = kernels.mla_decode, (left, right, int(has_sink))
        sink = (inputs.attn_sink.view(num_heads_k, -1) if has_sink else poisoned(num_heads_k, 1),)
    else:
        function, bounds, sink = kernels.mla_decode_plain, (right,), ()
    function(
        fold_heads(q, num_heads_k),
        k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        metadata,
        num_splits,
        out,
        lse,
        poisoned(max_num_splits, num_heads_k, rows, HEAD_DIM_V),
        poisoned(max_num_splits, num_heads_k, rows),
        *sink,
        max(scale * math.log2(math.e), 2.0**-126),  # the API's floor
        lse_scale,
        seq_len_q,
        num_heads_q // num_heads_k,
        *bounds,
    )
    lse = unfold_heads(lse[..., None], seq_len_q)[..., 0].transpose(1, 2)
    return Result(unfold_heads(out, seq_len_q), lse, num_splits)

"""Call a module's kernels themselves: any number of parts, outputs and partial buffers full of NaN."""

from __future__ import annotations

import dataclasses
import math

import torch

from cases import HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE, Inputs
from schedules import spread_schedule
from tilemla.launch import kernels_for


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


def decode(inputs: Inputs, *, causal=False, softmax_scale=None, num_sm_parts=8) -> Result:
    """Decode with as many splits as there can be. What the kernels leave unwritten stays NaN."""
    q, k_cache = inputs.q, inputs.k_cache
    batch_size, seq_len_q, num_heads_q, _ = q.shape
    num_heads_k = k_cache.shape[2]
    rows = seq_len_q * num_heads_q // num_heads_k
    kernels = kernels_for(q.device, q.dtype, HEAD_DIM_QK, HEAD_DIM_V, PAGE_BLOCK_SIZE)
    int32 = dict(dtype=torch.int32, device=q.device)
    schedule = spread_schedule(inputs.cache_seqlens.tolist(), num_sm_parts)
    metadata, num_splits = (torch.from_numpy(array).to(**int32) for array in schedule)

    def poisoned(*shape, dtype=torch.float32):
        return torch.full(shape, float("nan"), dtype=dtype, device=q.device)

    max_num_splits = batch_size + num_sm_parts
    out = poisoned(batch_size, num_heads_k, rows, HEAD_DIM_V, dtype=q.dtype)
    lse = poisoned(batch_size, num_heads_k, rows)
    scale = HEAD_DIM_QK**-0.5 if softmax_scale is None else softmax_scale
    kernels.mla_decode(
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
        torch.zeros((num_heads_k, num_heads_q // num_heads_k), device=q.device),
        max(scale * math.log2(math.e), 2.0**-126),  # the API's floor
        math.log(2.0),
        seq_len_q,
        num_heads_q // num_heads_k,
        -1,
        0 if causal else -1,
        0,
    )
    lse = unfold_heads(lse[..., None], seq_len_q)[..., 0].transpose(1, 2)
    return Result(unfold_heads(out, seq_len_q), lse, num_splits)

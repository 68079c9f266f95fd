"""FlashMLA's decode call, through generated modules."""

from __future__ import annotations

import math
from typing import Any

import torch

from tilemla.launch import kernels_for
from tilemla.schedule import (
    FlashMLASchedMeta,
    ScheduleConfig,
    get_mla_metadata,
    make_schedule,
    num_sm_parts_for,
)
from tilemla.validate import (
    TMA_ALIGNMENT_ELEMENTS,
    check_cpu_pages,
    check_cpu_schedule,
    check_decode_arguments,
    check_schedule_tensors,
    check_tma_layout,
)

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata"]

_LOG2E = math.log2(math.e)
_FLOAT32_TINY = 2.0**-126  # the smallest normal number


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to a paged latent KV cache (the signature of FlashMLA's ``flash_mla_with_kvcache``).

    Parameters
    ----------
    q : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_qk), bfloat16 or float16
        Queries, with stride 1 in the last dimension. On a GPU a copy is made where address or strides are not
        multiples of 16 bytes.
    k_cache : Tensor, (num_blocks, page_block_size, num_heads_k, head_dim_qk), q's dtype
        Pages of the cache: keys, whose first ``head_dim_v`` elements are the values.
    block_table : Tensor, (batch_size, max_num_blocks_per_seq), int32
        Page ids of each request, in order. Entries past its length are never used and may hold anything.
    cache_seqlens : Tensor, (batch_size,), int32
        Tokens of each request in the cache, 0 or more. Slots of a page past a request's length are never used.
    head_dim_v : int
        Elements of a value.
    tile_scheduler_metadata, num_splits
        What ``get_mla_metadata`` returned: a ``FlashMLASchedMeta`` and None, or two int32 tensors
        ``(num_sm_parts, 8)`` and ``(batch_size + 1,)``. A longer ``num_splits`` is fine.
    softmax_scale : float, optional
        Factor of the scores, not negative; ``head_dim_qk ** -0.5`` by default.
    causal : bool
        Query i of seq_len_q sees the first ``cache_seqlens - seq_len_q + i + 1`` tokens.
    is_fp8_kvcache, indices, attn_sink, extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length
        Upstream's arguments for caches that there are no kernels for yet; must be left at their defaults.

    Returns
    -------
    out : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_v), q's dtype
        0 for a query that sees no token.
    softmax_lse : Tensor, (batch_size, num_heads_q, seq_len_q), float32
        Natural log of the sum of exponentials of the scaled scores; +inf for a query that sees no token. Not
        contiguous where seq_len_q > 1, as upstream.

    Raises
    ------
    TypeError, ValueError
        On an argument that does not fit, naming it, what it must be and what it got.
    NotImplementedError
        When there is no kernel for the device, dtype, head dim, page size or cache format, or it cannot be built
        (``ModuleNotBuiltError``).
    """
    if (
        is_fp8_kvcache
        or indices is not None
        or attn_sink is not None
        or extra_k_cache is not None
        or extra_indices_in_kvcache is not None
        or topk_length is not None
        or extra_topk_length is not None
    ):
        _refuse_formats(
            is_fp8_kvcache=is_fp8_kvcache or None,
            indices=indices,
            attn_sink=attn_sink,
            extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache,
            topk_length=topk_length,
            extra_topk_length=extra_topk_length,
        )
    block_table, cache_seqlens = check_decode_arguments(
        q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal
    )
    batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
    num_blocks, page_block_size, num_heads_k, _ = k_cache.shape
    device = q.device
    if k_cache.requires_grad:  # DLPack takes no tensor that does; there is no backward pass
        k_cache = k_cache.detach()
    kernels = kernels_for(device, q.dtype, head_dim_qk, head_dim_v, page_block_size)
    on_cpu = device.type == "cpu"
    if on_cpu:
        check_cpu_pages(block_table, cache_seqlens, num_blocks, page_block_size)
    else:
        k_cache = check_tma_layout(k_cache)
    group = num_heads_q // num_heads_k
    rows = seq_len_q * group
    # The last query sees every token: with one query the mask changes nothing.
    causal = causal and seq_len_q > 1

    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError(f"num_splits must be None beside a FlashMLASchedMeta, got {type(num_splits).__name__}")
        sched_meta = tile_scheduler_metadata
        config = ScheduleConfig(batch_size, seq_len_q, num_heads_q, num_heads_k, page_block_size, causal, device)
        if not sched_meta.have_initialized:
            num_sm_parts = num_sm_parts_for(kernels.num_sms, rows, num_heads_k)
            schedule = make_schedule(cache_seqlens, num_sm_parts)
            sched_meta.tile_scheduler_metadata, sched_meta.num_splits = schedule
            sched_meta.config, sched_meta.have_initialized = config, True
        elif sched_meta.config != config:
            raise ValueError(
                "tile_scheduler_metadata must be used for calls like the one that filled it in, "
                f"{sched_meta.config}; got a call of {config}"
            )
        metadata, splits = check_schedule_tensors(
            sched_meta.tile_scheduler_metadata, sched_meta.num_splits, batch_size, device
        )
    else:
        metadata, splits = check_schedule_tensors(tile_scheduler_metadata, num_splits, batch_size, device)
    if on_cpu:
        check_cpu_schedule(metadata, splits, cache_seqlens)

    softmax_lse = torch.empty((batch_size, num_heads_k, rows), dtype=torch.float32, device=device)
    out = torch.empty((batch_size, num_heads_k, rows, head_dim_v), dtype=q.dtype, device=device)
    if batch_size:
        max_num_splits = batch_size + metadata.shape[0]
        kernels.mla_decode(
            _fold_heads(q, num_heads_k, group, on_cpu),
            # A cache without pages serves requests without tokens, but no kernel can be given an empty tensor.
            k_cache if num_blocks else k_cache.new_zeros((1, page_block_size, num_heads_k, head_dim_qk)),
            block_table if block_table.shape[1] else block_table.new_zeros((batch_size, 1)),
            cache_seqlens,
            metadata,
            splits,
            out,
            softmax_lse,
            # out_accum and lse_accum_log2
            torch.empty((max_num_splits, num_heads_k, rows, head_dim_v), dtype=torch.float32, device=device),
            torch.empty((max_num_splits, num_heads_k, rows), dtype=torch.float32, device=device),
            # A scale of 0 still has to leave a masked score at -inf; times this, every finite score is 0 in float32.
            max((head_dim_qk**-0.5 if softmax_scale is None else softmax_scale) * _LOG2E, _FLOAT32_TINY),
            seq_len_q,
            group,
            int(causal),
        )
    return _unfold_heads(out, seq_len_q, group), _unfold_lse(softmax_lse, seq_len_q, group)


def _fold_heads(q: torch.Tensor, num_heads_k: int, group: int, on_cpu: bool) -> torch.Tensor:
    """Bring queries to (batch_size, num_heads_k, seq_len_q * group, head_dim_qk), by view where possible."""
    batch_size, seq_len_q, _, head_dim_qk = q.shape
    if q.requires_grad:
        q = q.detach()
    if num_heads_k > 1:
        q = q.view(batch_size, seq_len_q, num_heads_k, group, head_dim_qk).transpose(1, 2)
    if num_heads_k > 1 or seq_len_q > 1:  # with one query and one KV head, q has that shape already
        q = q.reshape(batch_size, num_heads_k, seq_len_q * group, head_dim_qk)
    if on_cpu:
        return q
    batch_stride, head_stride, row_stride, _ = q.stride()
    misaligned = batch_stride | head_stride | row_stride | (q.data_ptr() // q.element_size())
    if misaligned % TMA_ALIGNMENT_ELEMENTS or not (batch_stride and head_stride and row_stride):
        return q.clone(memory_format=torch.contiguous_format)
    return q


def _unfold_heads(out: torch.Tensor, seq_len_q: int, group: int) -> torch.Tensor:
    """Bring (batch_size, num_heads_k, seq_len_q * group, head_dim_v) to (batch_size, seq_len_q, num_heads_q, …)."""
    batch_size, num_heads_k, _, head_dim_v = out.shape
    if num_heads_k == 1 == seq_len_q:
        return out
    if num_heads_k == 1:
        return out.view(batch_size, seq_len_q, group, head_dim_v)
    out = out.view(batch_size, num_heads_k, seq_len_q, group, head_dim_v).transpose(1, 2)
    return out.reshape(batch_size, seq_len_q, num_heads_k * group, head_dim_v).contiguous()


def _unfold_lse(softmax_lse: torch.Tensor, seq_len_q: int, group: int) -> torch.Tensor:
    """Bring (batch_size, num_heads_k, seq_len_q * group) to (batch_size, num_heads_q, seq_len_q)."""
    batch_size, num_heads_k, rows = softmax_lse.shape
    if seq_len_q == 1:
        return softmax_lse.view(batch_size, num_heads_k * rows, 1)
    softmax_lse = softmax_lse.view(batch_size, num_heads_k, seq_len_q, group).transpose(2, 3)
    return softmax_lse.reshape(batch_size, num_heads_k * group, seq_len_q)


def _refuse_formats(**arguments: Any) -> None:
    names = ", ".join(name for name, value in arguments.items() if value is not None)
    raise NotImplementedError(
        f"{names} must be left at the default: only dense bfloat16 and float16 caches have kernels"
    )

"""FlashMLA's decode call, through generated modules."""

from __future__ import annotations

from typing import Any

import torch

from tilemla.launch import kernels_for
from tilemla.plan import DecodePlan, remember
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
    # A call like one that was checked before goes straight to the module, which looks at every tensor itself. What it
    # refuses is checked again below, where the argument is named in the words of this interface.
    metadata: Any = tile_scheduler_metadata
    splits: Any = num_splits
    config = None
    if metadata.__class__ is FlashMLASchedMeta and splits is None:
        metadata, splits, config = metadata.tile_scheduler_metadata, metadata.num_splits, metadata.config
    try:
        kind = (
            q.shape,
            q.dtype,
            q.device,
            head_dim_v,
            head_dim_v.__class__,
            softmax_scale,
            softmax_scale.__class__,
            causal,
            causal.__class__,
        )
        plan, planned = _plans[kind]
    except (AttributeError, TypeError):  # q is no tensor, or something is no key
        kind = None
    except KeyError:
        pass
    else:
        if splits is not None and (config is None or config == planned):
            try:
                return plan.run(q, k_cache, block_table, cache_seqlens, metadata, splits)  # type: ignore[arg-type]
            except (TypeError, ValueError, RuntimeError):
                pass  # what is wrong is found, and said, below
    return _check_and_decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        kind,
    )


# Calls that were checked, each with what a schedule that filled itself in must be for, by what the module cannot tell
# from the tensors. A call that fits its plan but for the cache's geometry is checked again and takes the plan's place.
_plans: dict[tuple[Any, ...], tuple[DecodePlan, ScheduleConfig]] = {}


def _check_and_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    kind: tuple[Any, ...] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check every argument, decode, and remember the plan of a call on a GPU as ``kind``."""
    block_table, cache_seqlens = check_decode_arguments(
        q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal
    )
    batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
    num_blocks, page_block_size, num_heads_k, _ = k_cache.shape
    device = q.device
    if q.requires_grad or k_cache.requires_grad:  # DLPack takes no tensor that does; there is no backward pass
        q, k_cache = q.detach(), k_cache.detach()
    kernels = kernels_for(device, q.dtype, head_dim_qk, head_dim_v, page_block_size)
    on_cpu = device.type == "cpu"
    if on_cpu:
        check_cpu_pages(block_table, cache_seqlens, num_blocks, page_block_size)
    else:
        k_cache = check_tma_layout(k_cache)
        q = _readable_by_tma(q)
    q = _with_heads_side_by_side(q)
    # The last query sees every token: with one query the mask changes nothing.
    causal = causal and seq_len_q > 1
    config = ScheduleConfig(batch_size, seq_len_q, num_heads_q, num_heads_k, page_block_size, causal, device)

    if isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        if num_splits is not None:
            raise ValueError(f"num_splits must be None beside a FlashMLASchedMeta, got {type(num_splits).__name__}")
        sched_meta = tile_scheduler_metadata
        if not sched_meta.have_initialized:
            rows = seq_len_q * (num_heads_q // num_heads_k)
            num_sm_parts = num_sm_parts_for(kernels.num_sms, rows, num_heads_k)
            schedule = make_schedule(cache_seqlens, num_sm_parts, rows)
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

    # A cache without pages serves requests without tokens, but no kernel can be given an empty tensor.
    has_empty = not (batch_size and num_blocks and block_table.shape[1])
    if not num_blocks:
        k_cache = k_cache.new_zeros((1, page_block_size, num_heads_k, head_dim_qk))
    if not block_table.shape[1]:
        block_table = block_table.new_zeros((batch_size, 1))
    known = _plans.get(kind) if kind is not None else None
    if known is not None and known[1] == config and metadata.shape[0] <= known[0].num_sm_parts:
        plan, _ = known
    else:
        plan = DecodePlan(
            kernels,
            q,
            num_heads_k=num_heads_k,
            head_dim_v=head_dim_v,
            num_sm_parts=metadata.shape[0],
            softmax_scale=softmax_scale,
            causal=causal,
        )
    result = plan.run(q, k_cache, block_table, cache_seqlens, metadata, splits)
    if kind is not None and not (on_cpu or has_empty or plan.copies):
        remember(_plans, kind, (plan, config))
    return result


def _readable_by_tma(q: torch.Tensor) -> torch.Tensor:
    """Return queries as TMA can read them: as they are, or a copy."""
    batch_stride, query_stride, head_stride, _ = q.stride()
    misaligned = batch_stride | query_stride | head_stride | (q.data_ptr() // q.element_size())
    if misaligned % TMA_ALIGNMENT_ELEMENTS or not (batch_stride and query_stride and head_stride):
        return q.clone(memory_format=torch.contiguous_format)
    return q


def _with_heads_side_by_side(q: torch.Tensor) -> torch.Tensor:
    """Return queries whose heads can be folded by strides: as they are, or a copy."""
    _, seq_len_q, num_heads_q, _ = q.shape
    _, query_stride, head_stride, _ = q.stride()
    if seq_len_q > 1 and num_heads_q > 1 and query_stride != num_heads_q * head_stride:
        return q.contiguous()
    return q


def _refuse_formats(**arguments: Any) -> None:
    names = ", ".join(name for name, value in arguments.items() if value is not None)
    raise NotImplementedError(
        f"{names} must be left at the default: only dense bfloat16 and float16 caches have kernels"
    )

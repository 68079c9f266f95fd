"""Decode over the tokens that indices name: ``flash_mla_with_kvcache`` with ``indices``."""

from __future__ import annotations

from typing import Any

import torch

from tilemla.constants import constant
from tilemla.given import find_schedule, recall_schedule
from tilemla.launch import module_of_kind, num_sms_of
from tilemla.options import Options, check_attn_sink, check_results, has_heads_side_by_side
from tilemla.plan import exact_values, log2_scale, remember
from tilemla.sched_meta import SparseScheduleConfig
from tilemla.schedule import make_batch_invariant_schedule
from tilemla.sparse_plan import ListPlan, SparsePlan, TokenList
from tilemla.sparse_validate import (
    check_chosen_cache,
    check_indices,
    check_lengths,
    check_no_mask,
    check_pages,
    check_queries,
)
from tilemla.streams import is_capturing
from tilemla.validate import SCHEDULING_BLOCK, check_cpu_schedule, check_int, check_softmax_scale

_INDICES_LAYOUT = "(batch_size, seq_len_q, topk)"


def count_tokens(
    indices: torch.Tensor,
    topk_length: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
    extra_topk_length: torch.Tensor | None,
) -> torch.Tensor:
    """What a schedule takes for the lengths of the requests, (batch_size,) int32: 64 for each block of either list."""
    blocks = _count_blocks(indices, topk_length)
    if extra_indices is not None:
        blocks = blocks + _count_blocks(extra_indices, extra_topk_length)
    return blocks * SCHEDULING_BLOCK


def _count_blocks(indices: torch.Tensor, topk_length: torch.Tensor | None) -> torch.Tensor:
    batch_size, _, topk = indices.shape
    if topk_length is None:
        return constant(indices.device, batch_size, _blocks_of(topk))
    return (topk_length.clamp(0, topk) + (SCHEDULING_BLOCK - 1)) // SCHEDULING_BLOCK


# Plans of calls that were checked, each with what a schedule that filled itself in must be for, by what the module
# cannot tell from the tensors.
_plans: dict[tuple[Any, ...], tuple[SparsePlan, SparseScheduleConfig]] = {}


def decode_chosen(
    q: Any,
    k_cache: Any,
    head_dim_v: Any,
    tile_scheduler_metadata: Any,
    num_splits: Any,
    softmax_scale: Any,
    causal: Any,
    is_fp8_kvcache: Any,
    indices: Any,
    attn_sink: Any,
    extra_k_cache: Any,
    extra_indices: Any,
    topk_length: Any,
    extra_topk_length: Any,
    out: Any,
    softmax_lse: Any,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check every argument of a call with ``indices``, and decode.

    Parameters and results are those of ``flash_mla_with_kvcache``; what it raises is raised here.
    """
    # As in `interface`, a call like one that was checked before goes straight to the module.
    kind: tuple[Any, ...] | None
    try:
        kind = (
            q.shape,
            q.dtype,
            q.device,
            _look_of(k_cache, indices, topk_length),
            _look_of(extra_k_cache, extra_indices, extra_topk_length),
            None if attn_sink is None else attn_sink.shape,
            exact_values(head_dim_v, softmax_scale, causal),
            is_fp8_kvcache,
            options,
        )
        known = _plans.get(kind)
    except (AttributeError, TypeError):  # something is no tensor, or no key
        kind = known = None
    main = (k_cache, indices, topk_length)
    extra = None if extra_k_cache is None else (extra_k_cache, extra_indices, extra_topk_length)
    if known is not None:
        plan, planned = known
        schedule = recall_schedule(tile_scheduler_metadata, num_splits)
        if schedule is not None:
            metadata, splits, config = schedule
            try:
                has_room = metadata.shape[0] <= plan.num_sm_parts and splits.shape[0] > q.shape[0]
                if has_room and (config is None or config == planned):
                    return plan.run(q, main, extra, metadata, splits, out, softmax_lse, attn_sink)
            except (AttributeError, TypeError, ValueError, RuntimeError):
                pass  # what is wrong is found, and said, below
    check_queries(q, 4, "(batch_size, seq_len_q, num_heads_q, head_dim_qk)")
    check_no_mask(causal, options.window_size)
    check_int("head_dim_v", head_dim_v, 1)
    check_softmax_scale("softmax_scale", softmax_scale)
    attn_sink = check_attn_sink(attn_sink, q)
    check_results(out, softmax_lse, q, head_dim_v)
    head_dim_qk = q.shape[3]
    device = q.device
    kv_format = _check_list("", q, is_fp8_kvcache, *main)
    if extra_k_cache is not None or extra_indices is not None:
        _check_list("extra_", q, is_fp8_kvcache, extra_k_cache, extra_indices, extra_topk_length)
    elif extra_topk_length is not None:
        raise ValueError("extra_topk_length must be None without extra_k_cache and extra_indices_in_kvcache")
    module = module_of_kind(
        device,
        "flash_mla_with_kvcache",
        kernel="mla_sparse_decode",
        kv_format=kv_format,
        dtype=q.dtype,
        head_dim_qk=head_dim_qk,
        head_dim_v=head_dim_v,
    )
    config = SparseScheduleConfig.of(q, k_cache, kv_format, indices, extra_k_cache, extra_indices)
    metadata, splits, is_ours = _find_schedule(
        tile_scheduler_metadata, num_splits, main, extra, config, by_length=options.batch_invariant
    )
    lists = [ListPlan(each[0], each[1], is_fp8=is_fp8_kvcache) for each in (main, extra) if each is not None]
    plan = SparsePlan(
        module,
        q,
        lists[0],
        None if extra is None else lists[1],
        head_dim_v=head_dim_v,
        num_sm_parts=metadata.shape[0],
        scales=(log2_scale(softmax_scale, head_dim_qk), options.lse_scale),
        has_sink=attn_sink is not None,
    )
    # Written with a query's heads side by side, as upstream.
    written = softmax_lse if softmax_lse is not None and has_heads_side_by_side(softmax_lse) else None
    # DLPack takes no tensor that requires a gradient; there is no backward pass.
    result = plan.run(
        q.detach(),
        _detached(main),
        None if extra is None else _detached(extra),
        metadata,
        splits,
        None if out is None else out.detach(),
        None if written is None else written.detach(),
        attn_sink,
    )
    is_like_others = device.type == "cuda" and is_ours and q.shape[0] and not any(each.is_empty for each in lists)
    if kind is not None and is_like_others and not is_capturing():
        remember(_plans, kind, (plan, config))
    if softmax_lse is not None and written is None:
        softmax_lse.detach().copy_(result[1])
    return result[0] if out is None else out, result[1] if softmax_lse is None else softmax_lse


def _look_of(k_cache: Any, indices: Any, topk_length: Any) -> tuple[Any, ...] | None:
    """What plans are found by of a cache, indices and lengths; None where there is none of these."""
    if k_cache is None and indices is None and topk_length is None:
        return None
    return (k_cache.shape, k_cache.stride(), k_cache.dtype, indices.shape, topk_length is None)


def _detached(each: TokenList) -> TokenList:
    k_cache, indices, topk_length = each
    return k_cache.detach(), indices, topk_length


def _check_list(
    prefix: str, q: torch.Tensor, is_fp8_kvcache: bool, k_cache: Any, indices: Any, topk_length: Any
) -> str:
    """Check a cache and the indices into it; returns the cache's format."""
    k_cache_name, length_name = f"{prefix}k_cache", f"{prefix}topk_length"
    indices_name = "extra_indices_in_kvcache" if prefix else "indices"
    for name, value, other in ((k_cache_name, k_cache, indices_name), (indices_name, indices, k_cache_name)):
        if value is None:
            raise ValueError(f"{name} must be given beside {other}, got None")
    kv_format = check_chosen_cache(k_cache_name, k_cache, q, is_fp8_kvcache)
    shape = (q.shape[0], q.shape[1])
    check_indices(indices_name, indices, _INDICES_LAYOUT, shape, q.device)
    if topk_length is not None:
        check_lengths(length_name, topk_length, "batch_size", q.shape[0], q.device)
    if kv_format != "dense":
        check_pages(k_cache_name, k_cache)
    return kv_format


def _find_schedule(
    tile_scheduler_metadata: Any,
    num_splits: Any,
    main: TokenList,
    extra: TokenList | None,
    config: SparseScheduleConfig,
    *,
    by_length: bool,
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """The schedule of a call, made where it is not there yet: that of sequences of 64 tokens for each block.

    With it, whether it is the one that was given.
    """

    def lengths() -> torch.Tensor:
        return count_tokens(*main[1:], *((None, None) if extra is None else extra[1:]))

    most = (_blocks_of(config.topk) + _blocks_of(config.extra_topk or 0)) * SCHEDULING_BLOCK
    if not by_length:
        if tile_scheduler_metadata is None:
            raise TypeError("tile_scheduler_metadata must be what get_mla_metadata returned, got None")
        given = find_schedule(tile_scheduler_metadata, num_splits, lengths, config, num_sms_of(config.device))
        by_length = given.by_length
        metadata, splits, _ = given
    if by_length:
        metadata, splits = make_batch_invariant_schedule(lengths(), most, seq_len_q=1)
    elif config.device.type == "cpu":
        _check_schedule(metadata, splits, lengths(), most)
    return metadata, splits, not by_length


def _blocks_of(topk: int) -> int:
    return -(-topk // SCHEDULING_BLOCK)


def _check_schedule(metadata: torch.Tensor, splits: torch.Tensor, lengths: torch.Tensor, most: int) -> None:
    """Check a schedule in CPU memory: one for all of topk will do as well, for what is past a length names no token."""
    try:
        check_cpu_schedule(metadata, splits, torch.full_like(lengths, most), takes_order=False)
    except ValueError:
        check_cpu_schedule(metadata, splits, lengths, takes_order=False)

"""Operators of calls with indices, and of appending, for torch's compiler; see ``operators``."""

from __future__ import annotations

from typing import Any

import torch

from tilemla.operators import empty_results, fake, implement, library

_DECODE_ARGUMENTS = (
    "Tensor q, Tensor k_cache, int head_dim_v, Tensor? tile_scheduler_metadata, Tensor? num_splits, "
    "float? softmax_scale, bool is_fp8_kvcache, Tensor indices, Tensor? attn_sink, Tensor? extra_k_cache, "
    "Tensor? extra_indices_in_kvcache, Tensor? topk_length, Tensor? extra_topk_length, str lse_base, "
    "bool batch_invariant"
)
library.define(
    "get_mla_metadata_of_indices(Tensor indices, int num_heads_q, Tensor? topk_length, "
    "Tensor? extra_indices_in_kvcache, Tensor? extra_topk_length) -> (Tensor, Tensor)"
)
library.define(f"flash_mla_with_indices({_DECODE_ARGUMENTS}) -> (Tensor, Tensor)")
library.define(f"flash_mla_with_indices_out({_DECODE_ARGUMENTS}, Tensor(a!) out, Tensor(b!) softmax_lse) -> ()")
library.define(
    "flash_mla_sparse_fwd(Tensor q, Tensor kv, Tensor indices, float sm_scale, int d_v, Tensor? attn_sink, "
    "Tensor? topk_length) -> (Tensor, Tensor, Tensor)"
)
library.define("append_k_cache(Tensor latent, Tensor(a!) k_cache, Tensor slot_mapping) -> ()")


@implement("get_mla_metadata_of_indices")
def _get_mla_metadata_of_indices(
    indices: torch.Tensor,
    num_heads_q: int,
    topk_length: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
    extra_topk_length: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilemla.launch import num_sms_of
    from tilemla.schedule import make_schedule, num_sm_parts_for
    from tilemla.sparse import count_tokens

    lengths = count_tokens(indices, topk_length, extra_indices, extra_topk_length)
    num_sm_parts = num_sm_parts_for(num_sms_of(indices.device), num_heads_q, indices.shape[1])
    return make_schedule(lengths, num_sm_parts, num_heads_q, kind="indexed")


@fake("get_mla_metadata_of_indices")
def _fake_get_mla_metadata_of_indices(
    indices: torch.Tensor, num_heads_q: int, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilemla.launch import num_sms_of
    from tilemla.schedule import num_sm_parts_for
    from tilemla.validate import METADATA_FIELDS

    num_sm_parts = num_sm_parts_for(num_sms_of(indices.device), num_heads_q, indices.shape[1])
    return indices.new_empty((num_sm_parts, METADATA_FIELDS)), indices.new_empty((indices.shape[0] + 1,))


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor | None,
    num_splits: torch.Tensor | None,
    softmax_scale: float | None,
    is_fp8_kvcache: bool,
    indices: torch.Tensor,
    attn_sink: torch.Tensor | None,
    extra_k_cache: torch.Tensor | None,
    extra_indices: torch.Tensor | None,
    topk_length: torch.Tensor | None,
    extra_topk_length: torch.Tensor | None,
    lse_base: str,
    batch_invariant: bool,
    out: torch.Tensor | None = None,
    softmax_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilemla.interface import flash_mla_with_kvcache

    return flash_mla_with_kvcache(
        q,
        k_cache,
        None,
        None,
        head_dim_v,
        tile_scheduler_metadata,  # type: ignore[arg-type]
        num_splits,
        softmax_scale,
        False,
        is_fp8_kvcache,
        indices,
        attn_sink,
        extra_k_cache,
        extra_indices,
        topk_length,
        extra_topk_length,
        out=out,
        softmax_lse=softmax_lse,
        lse_base=lse_base,
        batch_invariant=batch_invariant,
    )


@implement("flash_mla_with_indices")
def _flash_mla_with_indices(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _decode(*arguments)


@implement("flash_mla_with_indices_out")
def _flash_mla_with_indices_out(*arguments: Any) -> None:
    _decode(*arguments)


@fake("flash_mla_with_indices")
def _fake_flash_mla_with_indices(
    q: torch.Tensor, k_cache: torch.Tensor, head_dim_v: int, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_results(q, head_dim_v)


@fake("flash_mla_with_indices_out")
def _fake_flash_mla_with_indices_out(*arguments: Any) -> None:
    return None


@implement("flash_mla_sparse_fwd")
def _flash_mla_sparse_fwd(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from tilemla.prefill import flash_mla_sparse_fwd

    return flash_mla_sparse_fwd(*arguments)


@fake("flash_mla_sparse_fwd")
def _fake_flash_mla_sparse_fwd(
    q: torch.Tensor, kv: torch.Tensor, indices: torch.Tensor, sm_scale: float, d_v: int, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = q.shape[:2]
    float32 = torch.float32
    return q.new_empty((*rows, d_v)), q.new_empty(rows, dtype=float32), q.new_empty(rows, dtype=float32)


@implement("append_k_cache")
def _append_k_cache(latent: torch.Tensor, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    from tilemla.append import append_k_cache

    append_k_cache(latent, k_cache, slot_mapping)


@fake("append_k_cache")
def _fake_append_k_cache(latent: torch.Tensor, k_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    return None


def decode_chosen_in_graph(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    attn_sink: torch.Tensor | None,
    formats: tuple[Any, ...],
    *,
    out: torch.Tensor | None,
    softmax_lse: torch.Tensor | None,
    window_size: tuple[int, int],
    lse_base: str,
    batch_invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``flash_mla_with_kvcache`` with ``indices`` is where torch.compile traces it.

    ``formats`` are ``is_fp8_kvcache`` or None, and the arguments of the lists. Most are checked when it runs.
    """
    from tilemla.sched_meta import FlashMLASchedMeta, SparseScheduleConfig
    from tilemla.sparse_validate import FP8_FORMATS, check_no_mask

    is_fp8_kvcache, indices, extra_k_cache, extra_indices, topk_length, extra_topk_length = formats
    check_no_mask(causal, window_size)
    if batch_invariant:
        tile_scheduler_metadata = num_splits = None
    elif isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        sched_meta = tile_scheduler_metadata
        kv_format = FP8_FORMATS.get(q.shape[3], "") if is_fp8_kvcache else "dense"
        config = SparseScheduleConfig.of(q, k_cache, kv_format, indices, extra_k_cache, extra_indices)
        if sched_meta.tile_scheduler_metadata is None:
            metadata, splits = torch.ops.tilemla.get_mla_metadata_of_indices(
                indices, q.shape[2], topk_length, extra_indices, extra_topk_length
            )
            sched_meta.fill_in(metadata, splits, config)
        else:
            sched_meta.expect(config)
        tile_scheduler_metadata, num_splits = sched_meta.tile_scheduler_metadata, sched_meta.num_splits
    arguments = (
        q,
        k_cache,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        bool(is_fp8_kvcache),
        indices,
        attn_sink,
        extra_k_cache,
        extra_indices,
        topk_length,
        extra_topk_length,
        lse_base,
        batch_invariant,
    )
    if out is None and softmax_lse is None:
        result: tuple[torch.Tensor, torch.Tensor] = torch.ops.tilemla.flash_mla_with_indices(*arguments)
        return result
    new_out, new_lse = empty_results(q, head_dim_v)
    out = new_out if out is None else out
    softmax_lse = new_lse if softmax_lse is None else softmax_lse
    torch.ops.tilemla.flash_mla_with_indices_out(*arguments, out, softmax_lse)
    return out, softmax_lse

"""The operators that torch's compiler sees: ``torch.ops.tilemla.*``, with what is needed to trace through them.

Eager calls do not come this way: the dispatcher costs about as much as the rest of a call. The public functions take it
where they are being traced, and the operators call the public functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

_DECODE_ARGUMENTS = (
    "Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, int head_dim_v, "
    "Tensor? tile_scheduler_metadata, Tensor? num_splits, float? softmax_scale, bool causal, Tensor? attn_sink, "
    "int window_left, int window_right, str lse_base, bool batch_invariant"
)
library: Any = torch.library.Library("tilemla", "DEF")  # type: ignore[no-untyped-call]
library.define(
    "get_mla_metadata(Tensor cache_seqlens, int num_q_tokens_per_head_k, int num_heads_k, int seq_len_q=1, "
    "int window_left=-1, str kind='dense') -> (Tensor, Tensor)"
)
library.define(f"flash_mla_with_kvcache({_DECODE_ARGUMENTS}) -> (Tensor, Tensor)")
library.define(f"flash_mla_with_kvcache_out({_DECODE_ARGUMENTS}, Tensor(a!) out, Tensor(b!) softmax_lse) -> ()")
library.define("merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, str lse_base) -> (Tensor, Tensor)")


def implement(name: str) -> Callable[[_Function], _Function]:
    """Register a function as an operator of that name on the devices that there are kernels for."""

    def register(function: _Function) -> _Function:
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        return function

    return register


def fake(name: str) -> Callable[[_Function], _Function]:
    """Register a function as what an operator of that name makes of tensors without values."""

    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"tilemla::{name}", function, lib=library)
        return function

    return register


@implement("get_mla_metadata")
def _get_mla_metadata(
    cache_seqlens: torch.Tensor,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    seq_len_q: int = 1,
    window_left: int = -1,
    kind: str = "dense",
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilemla.launch import num_sms_of
    from tilemla.schedule import get_mla_metadata, make_schedule, num_sm_parts_for

    if window_left < 0 and kind != "indexed":
        return get_mla_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, is_fp8_kvcache=kind == "fp8")
    return make_schedule(
        cache_seqlens,
        num_sm_parts_for(num_sms_of(cache_seqlens.device), num_q_tokens_per_head_k, num_heads_k),
        num_q_tokens_per_head_k,
        seq_len_q=seq_len_q,
        window_left=window_left,
        kind=kind,
    )


@fake("get_mla_metadata")
def _fake_get_mla_metadata(
    cache_seqlens: torch.Tensor,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    seq_len_q: int = 1,
    window_left: int = -1,
    kind: str = "dense",
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilemla.launch import num_sms_of
    from tilemla.schedule import num_sm_parts_for
    from tilemla.validate import METADATA_FIELDS

    num_sm_parts = num_sm_parts_for(num_sms_of(cache_seqlens.device), num_q_tokens_per_head_k, num_heads_k)
    return (
        cache_seqlens.new_empty((num_sm_parts, METADATA_FIELDS)),
        cache_seqlens.new_empty((cache_seqlens.shape[0] + 1,)),
    )


def _decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor | None,
    num_splits: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    attn_sink: torch.Tensor | None,
    window_left: int,
    window_right: int,
    lse_base: str,
    batch_invariant: bool,
    out: torch.Tensor | None = None,
    softmax_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilemla.interface import flash_mla_with_kvcache

    return flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,  # type: ignore[arg-type]
        num_splits,
        softmax_scale,
        causal,
        attn_sink=attn_sink,
        out=out,
        softmax_lse=softmax_lse,
        window_size=(window_left, window_right),
        lse_base=lse_base,
        batch_invariant=batch_invariant,
    )


@implement("flash_mla_with_kvcache")
def _flash_mla_with_kvcache(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _decode(*arguments)


@implement("flash_mla_with_kvcache_out")
def _flash_mla_with_kvcache_out(*arguments: Any) -> None:
    _decode(*arguments)


@fake("flash_mla_with_kvcache")
def _fake_flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_results(q, head_dim_v)


def empty_results(q: torch.Tensor, head_dim_v: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tensors for ``out`` and ``softmax_lse`` as an eager call makes them."""
    batch_size, seq_len_q, num_heads_q, _ = q.shape
    softmax_lse = q.new_empty((batch_size, seq_len_q, num_heads_q), dtype=torch.float32)
    return q.new_empty((batch_size, seq_len_q, num_heads_q, head_dim_v)), softmax_lse.transpose(1, 2)


@fake("flash_mla_with_kvcache_out")
def _fake_flash_mla_with_kvcache_out(*arguments: Any) -> None:
    return None


@implement("merge_states")
def _merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, lse_base: str
) -> tuple[torch.Tensor, torch.Tensor]:
    from tilemla.merge import merge_states

    return merge_states(out_a, lse_a, out_b, lse_b, lse_base=lse_base)


@fake("merge_states")
def _fake_merge_states(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, lse_base: str
) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, num_heads_q, seq_len_q = lse_a.shape
    lse = lse_a.new_empty((batch_size, seq_len_q, num_heads_q)).transpose(1, 2)
    return torch.empty_like(out_a, memory_format=torch.contiguous_format), lse


def decode_in_graph(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: Any,
    num_splits: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    attn_sink: torch.Tensor | None,
    *,
    out: torch.Tensor | None,
    softmax_lse: torch.Tensor | None,
    window_size: tuple[int, int],
    lse_base: str,
    batch_invariant: bool,
    formats: tuple[Any, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """What ``flash_mla_with_kvcache`` is where torch.compile traces it; the arguments are checked when it runs.

    ``formats`` are ``is_fp8_kvcache`` or None, and the arguments of calls with indices.
    """
    from tilemla.options import kernel_window, refuse_formats
    from tilemla.sched_meta import FlashMLASchedMeta, ScheduleConfig

    if formats[1] is not None:  # indices
        from tilemla.sparse_operators import decode_chosen_in_graph

        return decode_chosen_in_graph(
            q,
            k_cache,
            head_dim_v,
            tile_scheduler_metadata,
            num_splits,
            softmax_scale,
            causal,
            attn_sink,
            formats,
            out=out,
            softmax_lse=softmax_lse,
            window_size=window_size,
            lse_base=lse_base,
            batch_invariant=batch_invariant,
        )
    refuse_formats(*formats)
    if batch_invariant:
        tile_scheduler_metadata = num_splits = None
    elif isinstance(tile_scheduler_metadata, FlashMLASchedMeta):
        sched_meta = tile_scheduler_metadata
        config = ScheduleConfig.of(q, k_cache, causal, kernel_window(window_size, causal, q.shape[1])[0])
        if sched_meta.tile_scheduler_metadata is None:
            metadata, splits = torch.ops.tilemla.get_mla_metadata(
                cache_seqlens,
                config.tokens_per_head_k,
                config.num_heads_k,
                config.seq_len_q,
                config.window_left,
            )
            sched_meta.fill_in(metadata, splits, config)
        else:
            sched_meta.expect(config)
        tile_scheduler_metadata, num_splits = sched_meta.tile_scheduler_metadata, sched_meta.num_splits
    arguments = (
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        attn_sink,
        window_size[0],
        window_size[1],
        lse_base,
        batch_invariant,
    )
    if out is None and softmax_lse is None:
        result: tuple[torch.Tensor, torch.Tensor] = torch.ops.tilemla.flash_mla_with_kvcache(*arguments)
        return result
    new_out, new_lse = empty_results(q, head_dim_v)
    out = new_out if out is None else out
    softmax_lse = new_lse if softmax_lse is None else softmax_lse
    torch.ops.tilemla.flash_mla_with_kvcache_out(*arguments, out, softmax_lse)
    return out, softmax_lse

"""Decode through a block table over fp8 caches: those of 656 bytes a token, and e4m3 with one scale, as vLLM does."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tilemla.constants import constant
from tilemla.interface import decode_checked, decode_planned
from tilemla.kv_formats import FP8_LAYOUTS
from tilemla.launch import kernels_for
from tilemla.options import DEFAULT_OPTIONS, Options, check_attn_sink, check_results
from tilemla.plan import exact_values
from tilemla.sched_meta import FlashMLASchedMeta
from tilemla.schedule import get_mla_metadata
from tilemla.sparse_validate import (
    check_byte_cache,
    check_descale,
    check_one_head,
    check_pages,
    check_queries,
)
from tilemla.validate import check_decode_arguments, describe

# The format of bytes that tokens are read in through a block table.
_KV_FORMAT = "fp8_656"
_SCALES = ("descale_q", "descale_k")


def decode_bytes(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: Any,
    tile_scheduler_metadata: Any,
    num_splits: Any,
    softmax_scale: Any,
    causal: Any,
    attn_sink: Any,
    out: Any,
    softmax_lse: Any,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check a call with ``is_fp8_kvcache`` and without ``indices``, and decode.

    Parameters and results are those of ``flash_mla_with_kvcache``; what it raises is raised here.
    """
    kind: tuple[Any, ...] | None
    try:
        # A module that reads rows wherever they are cannot tell all that is asked of a cache.
        looks = (q.shape, q.dtype, q.device, k_cache.dtype, k_cache.shape[2:], k_cache.stride())
        kind = (looks, exact_values(head_dim_v, softmax_scale, causal), options)
        result = decode_planned(
            kind,
            q,
            k_cache.view(torch.uint8),
            block_table,
            cache_seqlens,
            tile_scheduler_metadata,
            num_splits,
            out,
            softmax_lse,
            attn_sink,
        )
    except (AttributeError, TypeError, RuntimeError):  # something is no tensor, no key, or has no bytes to view
        kind = result = None
    if result is not None:
        return result
    check_queries(q, 4, "(batch_size, seq_len_q, num_heads_q, head_dim_qk)")
    check_one_head("k_cache", k_cache, q.device, "q")
    head_dim_qk = FP8_LAYOUTS[_KV_FORMAT].head_dim
    if q.shape[3] != head_dim_qk:
        raise NotImplementedError(
            f"q must have head dim {head_dim_qk} where is_fp8_kvcache is True and indices are None, got {describe(q)}"
        )
    check_byte_cache("k_cache", k_cache, _KV_FORMAT, "is_fp8_kvcache is True")
    check_pages("k_cache", k_cache)
    block_table, cache_seqlens = check_decode_arguments(
        q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal, in_bytes=True
    )
    attn_sink = check_attn_sink(attn_sink, q)
    check_results(out, softmax_lse, q, head_dim_v)
    return decode_checked(
        kernels_for(q.device, q.dtype, head_dim_qk, head_dim_v, k_cache.shape[1], _KV_FORMAT),
        q.detach(),
        k_cache.detach().view(torch.uint8),
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        attn_sink,
        out,
        softmax_lse,
        options,
        kind,
    )


def get_mla_metadata_dense_fp8(
    cache_seqlens: torch.Tensor, num_q_tokens_per_head_k: int, num_heads_k: int
) -> tuple[Any, Any]:
    """Plan a call of ``flash_mla_with_kvcache_fp8`` (vLLM's function of that name).

    Parameters
    ----------
    cache_seqlens, num_q_tokens_per_head_k, num_heads_k
        As for ``get_mla_metadata``.

    Returns
    -------
    tile_scheduler_metadata, num_splits
        What ``get_mla_metadata`` returns with ``is_fp8_kvcache``.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As ``get_mla_metadata``.
    """
    return get_mla_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, is_fp8_kvcache=True)


def flash_mla_with_kvcache_fp8(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    descale_q: torch.Tensor | None = None,
    descale_k: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to a paged cache of e4m3 with queries in e4m3 (vLLM's function of that name).

    Parameters
    ----------
    q : Tensor, (batch_size, seq_len_q, num_heads_q, 576), float8_e4m3fn
        Queries, with stride 1 in the last dimension; on a GPU, address and strides must be multiples of 16 bytes.
    k_cache : Tensor, (num_blocks, 64, num_heads_k, 576), float8_e4m3fn
        Pages of the cache; strides are free but for the last, which is 1; on a GPU as q's.
    block_table, cache_seqlens, head_dim_v, tile_scheduler_metadata, num_splits, softmax_scale, causal
        As for ``flash_mla_with_kvcache``.
    descale_q, descale_k : Tensor, (1,), float32, optional
        What the elements of queries and of the cache are to be multiplied by, not negative; 1 by default.

    Returns
    -------
    out : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_v), bfloat16
        0 for a query that sees no token.
    softmax_lse : Tensor, (batch_size, num_heads_q, seq_len_q), float32
        Natural log of the sum of exponentials of the scaled scores; +inf for a query that sees no token.

    Raises
    ------
    TypeError, ValueError
        On an argument that does not fit, naming it, what it must be and what it got.
    NotImplementedError
        When there is no kernel for the device, head dim or page size, or it cannot be built (``ModuleNotBuiltError``);
        where torch.compile traces the call.
    """
    if is_dynamo_compiling():
        raise NotImplementedError(
            "flash_mla_with_kvcache_fp8 has no operator for torch.compile; leave the call out of the graph with "
            "torch.compiler.disable"
        )
    scales: tuple[Any, ...] = (descale_q, descale_k)
    kind: tuple[Any, ...] | None
    try:
        scales = tuple(constant(q.device, 1, 1.0, torch.float32) if scale is None else scale for scale in scales)
        looks = (q.shape, q.dtype, q.device, k_cache.dtype)
        kind = (looks, exact_values(head_dim_v, softmax_scale, causal), DEFAULT_OPTIONS)
        result = decode_planned(
            kind,
            q.view(torch.uint8),
            k_cache.view(torch.uint8),
            block_table,
            cache_seqlens,
            tile_scheduler_metadata,
            num_splits,
            None,
            None,
            None,
            scales,
        )
    except (AttributeError, TypeError, RuntimeError):  # something is no tensor, no key, or has no bytes to view
        kind = result = None
    if result is not None:
        return result
    block_table, cache_seqlens = check_decode_arguments(
        q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal
    )
    if q.dtype is not torch.float8_e4m3fn:
        raise TypeError(f"q must be float8_e4m3fn, got {describe(q)}")
    return decode_checked(
        kernels_for(q.device, torch.bfloat16, q.shape[3], head_dim_v, k_cache.shape[1], "dense_fp8"),
        q.detach().view(torch.uint8),
        k_cache.detach().view(torch.uint8),
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        None,
        None,
        None,
        DEFAULT_OPTIONS,
        kind,
        out_dtype=torch.bfloat16,
        scales=tuple(check_descale(name, scale, q.device) for name, scale in zip(_SCALES, scales, strict=True)),
    )

"""FlashMLA's decode call, through generated modules."""

from __future__ import annotations

from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from tilemla import operators, sparse_operators  # noqa: F401  # torch.ops.tilemla
from tilemla.given import Given, find_schedule, recall_schedule
from tilemla.launch import Kernels, kernels_for
from tilemla.options import (
    DEFAULT_OPTIONS,
    UNLIMITED,
    Options,
    Traits,
    check_attn_sink,
    check_options,
    check_results,
    has_heads_side_by_side,
)
from tilemla.plan import DecodePlan, exact_values, remember
from tilemla.sched_meta import FlashMLASchedMeta, ScheduleConfig
from tilemla.schedule import get_mla_metadata, make_batch_invariant_schedule
from tilemla.sparse import decode_chosen
from tilemla.sparse_validate import check_no_indices
from tilemla.validate import check_bool, check_cpu_pages, check_cpu_schedule, check_decode_arguments, check_tma_layout

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
    *,
    out: torch.Tensor | None = None,
    softmax_lse: torch.Tensor | None = None,
    window_size: tuple[int, int] = UNLIMITED,
    lse_base: str = "e",
    batch_invariant: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to a paged latent KV cache (the signature of FlashMLA's ``flash_mla_with_kvcache``).

    Parameters
    ----------
    q : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_qk), bfloat16 or float16
        Queries, with stride 1 in the last dimension; on a GPU, address and strides must be multiples of 16 bytes.
        Kernels see the heads that share a KV head in one row after the other: queries are copied where strides cannot
        say that, with several KV heads and several queries, or where a query's heads do not follow those of the
        query before it.
    k_cache : Tensor, (num_blocks, page_block_size, num_heads_k, head_dim_qk), q's dtype
        Pages of the cache: keys, whose first ``head_dim_v`` elements are the values. Strides are free but for the last,
        which is 1; on a GPU, address and strides must be multiples of 16 bytes. Never copied.
    block_table : Tensor, (batch_size, max_num_blocks_per_seq), int32
        Page ids of each request, in order, with any row stride. Entries past its length are never used and may hold
        anything. A replay of a captured call may have requests with more pages than the table that was captured is
        wide: rows are read on at their stride.
    cache_seqlens : Tensor, (batch_size,), int32
        Tokens of each request in the cache, 0 or more. Slots of a page past a request's length are never used.
    head_dim_v : int
        Elements of a value.
    tile_scheduler_metadata, num_splits
        What ``get_mla_metadata`` returned: a ``FlashMLASchedMeta`` and None, or two int32 tensors
        ``(num_sm_parts, 8)`` and ``(batch_size + 1,)``. A longer ``num_splits`` is fine, and without it the first
        tensor alone will do: the counts are those that came with it, or are taken from it on the device where torch
        has written to it since. A first tensor that was made before a CUDA graph's capture and is used in it without
        ``num_splits`` is planned again within the graph. ``tile_scheduler_metadata`` and ``num_splits`` that are set
        as attributes of either form take their place. One part in the order of older kernels, as vLLM's
        batch-invariant mode writes it, asks for ``batch_invariant``; on a GPU any ``(1, 8)`` tensor that
        ``get_mla_metadata`` did not return does.
    softmax_scale : float, optional
        Factor of the scores, not negative; ``head_dim_qk ** -0.5`` by default.
    causal : bool
        Query i of seq_len_q sees the first ``cache_seqlens - seq_len_q + i + 1`` tokens.
    attn_sink : Tensor, (num_heads_q,), float32, optional
        A score of each head that no token has: ``out`` is scaled by ``exp(lse) / (exp(lse) + exp(attn_sink))``, with
        the natural ``lse``; ``softmax_lse`` does not know of it. -inf changes nothing, +inf makes ``out`` 0.
    is_fp8_kvcache : bool
        Whether the cache is in one of FlashMLA's formats of bytes, as ``quantize_k_cache`` makes them, of shape
        ``(num_blocks, page_block_size, 1, bytes of a token)`` and dtype float8_e4m3fn, uint8 or int8: 656 bytes a token
        for head_dim_qk 576 and, with ``indices``, 584 for 512. Pages may be any distance apart; without ``indices``
        they are of 64 tokens. q is bfloat16.
    indices : Tensor, (batch_size, seq_len_q, topk), int32, optional
        What each query attends to, in place of all: ``page * page_block_size + offset`` of tokens in the cache, which
        has one KV head and pages of any size. An index that is negative or past the cache names no token; a token
        counts as often as it is named. ``block_table`` and ``cache_seqlens`` are then not looked at, and may be None;
        ``causal`` and ``window_size`` must be left at their defaults. Any stride but the last, which is 1.
    topk_length : Tensor, (batch_size,), int32, optional
        How many of a request's indices count, from the first on: less than 0 is none, more than topk is all. What the
        others name is not read.
    extra_k_cache, extra_indices_in_kvcache, extra_topk_length
        Tokens of a second cache that are attended to as well: as ``k_cache``, ``indices`` and ``topk_length``, with a
        page size and a topk of its own.
    out : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_v), q's dtype, optional
        Where to write the result, contiguous.
    softmax_lse : Tensor, (batch_size, num_heads_q, seq_len_q), float32, optional
        Where to write the log-sum-exp: laid out as it is returned, or contiguous, which costs a copy where seq_len_q
        and num_heads_q are larger than 1.
    window_size : (int, int)
        How many tokens to the left and to the right of its own position a query sees, both inclusive; -1 is all. Query
        i of seq_len_q is at ``cache_seqlens - seq_len_q + i``. Pages to the left of every window are not read.
    lse_base : {"e", "2"}
        Base of the logarithm in ``softmax_lse``.
    batch_invariant : bool
        Cut each request by its own length alone, at multiples of a number of tokens that is fixed: its bits then do
        not depend on the requests beside it. ``tile_scheduler_metadata`` and ``num_splits`` are ignored.

    Returns
    -------
    out : Tensor, (batch_size, seq_len_q, num_heads_q, head_dim_v), q's dtype
        0 for a query that sees no token.
    softmax_lse : Tensor, (batch_size, num_heads_q, seq_len_q), float32
        Log of the sum of exponentials of the scaled scores; +inf for a query that sees no token. Not contiguous where
        seq_len_q > 1, as upstream.

    Raises
    ------
    TypeError, ValueError
        On an argument that does not fit, naming it, what it must be and what it got.
    NotImplementedError
        When there is no kernel for the device, dtype, head dim, page size or cache format, or it cannot be built
        (``ModuleNotBuiltError``); for an fp8 cache without ``indices`` where torch.compile traces the call.
    """
    if is_dynamo_compiling():
        return operators.decode_in_graph(
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
            out=out,
            softmax_lse=softmax_lse,
            window_size=window_size,
            lse_base=lse_base,
            batch_invariant=batch_invariant,
            formats=(
                is_fp8_kvcache or None,
                indices,
                extra_k_cache,
                extra_indices_in_kvcache,
                topk_length,
                extra_topk_length,
            ),
        )
    options = None
    if (
        attn_sink is not None
        or is_fp8_kvcache
        or indices is not None
        or extra_k_cache is not None
        or extra_indices_in_kvcache is not None
        or topk_length is not None
        or extra_topk_length is not None
        or window_size is not UNLIMITED
        or lse_base != "e"
        or batch_invariant is not False
    ):
        options = check_options(
            window_size=window_size, lse_base=lse_base, attn_sink=attn_sink, batch_invariant=batch_invariant
        )
        check_bool("is_fp8_kvcache", is_fp8_kvcache)
        if indices is not None:
            return decode_chosen(
                q,
                k_cache,
                head_dim_v,
                tile_scheduler_metadata,
                num_splits,
                softmax_scale,
                causal,
                is_fp8_kvcache,
                indices,
                attn_sink,
                extra_k_cache,
                extra_indices_in_kvcache,
                topk_length,
                extra_topk_length,
                out,
                softmax_lse,
                options,
            )
        check_no_indices(extra_k_cache, extra_indices_in_kvcache, topk_length, extra_topk_length)
        if is_fp8_kvcache:
            from tilemla.fp8 import decode_bytes

            return decode_bytes(
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
                out,
                softmax_lse,
                options,
            )
    # A call like one that was checked before goes straight to the module, which looks at every tensor itself. What it
    # refuses is checked again below, where the argument is named in the words of this interface.
    kind: tuple[Any, ...] | None
    try:
        kind = (q.shape, q.dtype, q.device, exact_values(head_dim_v, softmax_scale, causal), options)
        result = decode_planned(
            kind,
            q,
            k_cache,
            block_table,
            cache_seqlens,
            tile_scheduler_metadata,
            num_splits,
            out,
            softmax_lse,
            attn_sink,
        )
    except (AttributeError, TypeError):  # q is no tensor, or something is no key
        kind = result = None
    if result is not None:
        return result
    return check_and_decode(
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
        out,
        softmax_lse,
        options or DEFAULT_OPTIONS,
        kind,
    )


# Calls that were checked, each with what a schedule that filled itself in must be for, by what the module cannot tell
# from the tensors. A call that fits its plan but for the cache's geometry is checked again and takes the plan's place.
_plans: dict[tuple[Any, ...], tuple[DecodePlan, ScheduleConfig]] = {}


def decode_planned(
    kind: tuple[Any, ...],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor | None,
    num_splits: torch.Tensor | None,
    out: torch.Tensor | None,
    softmax_lse: torch.Tensor | None,
    attn_sink: torch.Tensor | None,
    scales: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Decode as a call of the kind that was checked before; None, with nothing enqueued, where that cannot be.

    Raises
    ------
    TypeError
        Where the kind is none: something in it cannot be looked up.
    """
    known = _plans.get(kind)
    if known is None or (kind[-1] is not None and kind[-1].batch_invariant):  # then the schedule is not the one given
        return None
    schedule = recall_schedule(tile_scheduler_metadata, num_splits)
    if schedule is None:
        return None
    metadata, splits, config = schedule
    plan, planned = known
    if config is not None and config != planned:
        return None
    try:
        return plan.run(
            q,
            k_cache,
            block_table,  # type: ignore[arg-type]
            cache_seqlens,  # type: ignore[arg-type]
            metadata,
            splits,
            out,
            softmax_lse,
            attn_sink,
            scales,
        )
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None  # what is wrong is found, and said, by who asked


def check_and_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor | None,
    cache_seqlens: torch.Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor | None,
    num_splits: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor | None,
    softmax_lse: torch.Tensor | None,
    options: Options,
    kind: tuple[Any, ...] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check every argument, decode, and remember the plan of a call on a GPU as ``kind``."""
    block_table, cache_seqlens = check_decode_arguments(
        q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal
    )
    attn_sink = check_attn_sink(attn_sink, q)
    check_results(out, softmax_lse, q, head_dim_v)
    if q.requires_grad or k_cache.requires_grad:  # DLPack takes no tensor that does; there is no backward pass
        q, k_cache = q.detach(), k_cache.detach()
    return decode_checked(
        kernels_for(q.device, q.dtype, q.shape[3], head_dim_v, k_cache.shape[1]),
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
        out,
        softmax_lse,
        options,
        kind,
    )


def decode_checked(
    kernels: Kernels,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | torch.Tensor | None,
    num_splits: torch.Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    attn_sink: torch.Tensor | None,
    out: torch.Tensor | None,
    softmax_lse: torch.Tensor | None,
    options: Options,
    kind: tuple[Any, ...] | None = None,
    *,
    out_dtype: torch.dtype | None = None,
    scales: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the schedule of a call whose other arguments were checked, decode, and remember the plan as ``kind``.

    What a GPU's kernels ask of the layout of q and the cache is checked here, for every format.

    ``out_dtype`` is q's by default; ``scales`` are what a module's program takes beside q and the cache.
    """
    batch_size, seq_len_q, _, _ = q.shape
    num_blocks, page_block_size, num_heads_k, token_width = k_cache.shape
    on_cpu = q.device.type == "cpu"
    traits = Traits.of(options, causal, seq_len_q)
    window = dict(seq_len_q=seq_len_q, window_left=traits.window_left)
    if on_cpu:
        check_cpu_pages(block_table, cache_seqlens, num_blocks, page_block_size, **window)
    else:
        k_cache = check_tma_layout("k_cache", k_cache)
        q = check_tma_layout("q", q)
    q = _with_heads_side_by_side(q)
    config = ScheduleConfig.of(q, k_cache, causal, traits.window_left)
    by_length = options.batch_invariant
    if not by_length:
        given = find_schedule(tile_scheduler_metadata, num_splits, cache_seqlens, config, kernels.num_sms)
        by_length = given.by_length
    if by_length:
        max_tokens = block_table.shape[1] * page_block_size
        given = Given(*make_batch_invariant_schedule(cache_seqlens, max_tokens, **window), by_length)
    metadata, splits, _ = given
    if on_cpu:
        check_cpu_schedule(metadata, splits, cache_seqlens, seq_len_q=seq_len_q, window_left=traits.window_left)

    # A cache without pages serves requests without tokens, but no kernel can be given an empty tensor.
    has_empty = not (batch_size and num_blocks and block_table.shape[1])
    if not num_blocks:
        k_cache = k_cache.new_zeros((1, page_block_size, num_heads_k, token_width))
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
            traits=traits,
            out_dtype=out_dtype,
        )
    written = softmax_lse
    if written is not None and not has_heads_side_by_side(written) and not plan.copies:
        written = None  # a new one is made, and copied
    result = plan.run(q, k_cache, block_table, cache_seqlens, metadata, splits, out, written, attn_sink, scales)
    if softmax_lse is not None and written is None:
        softmax_lse.detach().copy_(result[1])
        result = (result[0], softmax_lse)
    if kind is not None and not (on_cpu or has_empty or plan.copies or (by_length and not options.batch_invariant)):
        remember(_plans, kind, (plan, config))
    return result


def _with_heads_side_by_side(q: torch.Tensor) -> torch.Tensor:
    """Return queries whose heads can be folded by strides: as they are, or a copy."""
    _, seq_len_q, num_heads_q, _ = q.shape
    _, query_stride, head_stride, _ = q.stride()
    if seq_len_q > 1 and num_heads_q > 1 and query_stride != num_heads_q * head_stride:
        return q.contiguous()
    return q

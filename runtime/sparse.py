"""Decode over the tokens that indices name: ``flash_mla_with_kvcache`` with ``indices``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tilemla.given import find_schedule
from tilemla.launch import module_of_kind, num_sms_of
from tilemla.loader import LoadedModule
from tilemla.options import Options, check_attn_sink, check_results, has_heads_side_by_side
from tilemla.plan import log2_scale
from tilemla.schedule import SparseScheduleConfig, make_batch_invariant_schedule
from tilemla.sparse_validate import (
    check_chosen_cache,
    check_indices,
    check_lengths,
    check_no_mask,
    check_queries,
    pages_of,
)
from tilemla.streams import is_capturing, on_device
from tilemla.validate import SCHEDULING_BLOCK, check_cpu_schedule, check_int, check_softmax_scale
from tilemla.workspace import Scratch

_INDICES_LAYOUT = "(batch_size, seq_len_q, topk)"


class Chosen(NamedTuple):
    """A cache, and the tokens of it that queries attend to.

    Parameters
    ----------
    k_cache : Tensor
        Pages as kernels take them: (num_blocks, page_block_size, head_dim_qk), or (num_blocks, bytes) uint8.
    page_block_size : int
        Tokens in a page.
    indices : Tensor, (batch_size, seq_len_q, topk), int32
        ``page * page_block_size + offset``.
    topk_length : Tensor, (batch_size,), int32, or None
        How many indices of each request count; None is all.
    """

    k_cache: torch.Tensor
    page_block_size: int
    indices: torch.Tensor
    topk_length: torch.Tensor | None

    def kernel_arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cache, indices and lengths as the kernel takes them. A cache without pages has no token to name."""
        batch_size, _, topk = self.indices.shape
        k_cache, length = self.k_cache, self.topk_length
        if not k_cache.shape[0]:
            k_cache, length = k_cache.new_zeros((1, *k_cache.shape[1:])), constant(self.indices.device, batch_size, 0)
        return k_cache, self.indices, constant(self.indices.device, batch_size, topk) if length is None else length


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


def constant(device: torch.device, count: int, value: int) -> torch.Tensor:
    """A tensor of equal int32, (count,); one that a graph's memory holds is not kept for calls outside of it."""
    make = _make_constant.__wrapped__ if device.type == "cuda" and is_capturing() else _make_constant
    return make(device, count, value)


@functools.lru_cache(maxsize=64)
def no_sink(device: torch.device) -> torch.Tensor:
    """What kernels are given in place of sinks that there are none of; never read."""
    return torch.empty((1,), dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=256)
def _make_constant(device: torch.device, count: int, value: int) -> torch.Tensor:
    return torch.full((count,), value, dtype=torch.int32, device=device)


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
    check_queries(q, 4, "(batch_size, seq_len_q, num_heads_q, head_dim_qk)")
    check_no_mask(causal, options.window_size)
    check_int("head_dim_v", head_dim_v, 1)
    check_softmax_scale("softmax_scale", softmax_scale)
    attn_sink = check_attn_sink(attn_sink, q)
    check_results(out, softmax_lse, q, head_dim_v)
    batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
    device = q.device
    chosen, kv_format = _check_chosen("", q, is_fp8_kvcache, k_cache, indices, topk_length)
    extra = None
    if extra_k_cache is not None or extra_indices is not None:
        extra, _ = _check_chosen("extra_", q, is_fp8_kvcache, extra_k_cache, extra_indices, extra_topk_length)
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
    metadata, splits = _find_schedule(
        tile_scheduler_metadata, num_splits, chosen, extra, config, by_length=options.batch_invariant
    )
    if out is None:
        out = torch.empty((batch_size, seq_len_q, num_heads_q, head_dim_v), dtype=q.dtype, device=device)
    # Written with a query's heads side by side, as upstream.
    in_place = softmax_lse is not None and has_heads_side_by_side(softmax_lse)
    lse = softmax_lse.detach().transpose(1, 2) if in_place else None
    if lse is None:
        lse = torch.empty((batch_size, seq_len_q, num_heads_q), dtype=torch.float32, device=device)
    if batch_size:  # no kernel runs for an empty batch
        with on_device(device):
            _run(
                module,
                q.detach(),
                chosen,
                extra,
                metadata,
                splits,
                out.detach(),
                lse,
                attn_sink,
                (log2_scale(softmax_scale, head_dim_qk), options.lse_scale),
            )
    if softmax_lse is None:
        softmax_lse = lse.transpose(1, 2)
    elif not in_place:
        softmax_lse.detach().copy_(lse.transpose(1, 2))
    return out, softmax_lse


def _run(
    module: LoadedModule,
    q: torch.Tensor,
    chosen: Chosen,
    extra: Chosen | None,
    metadata: torch.Tensor,
    splits: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    attn_sink: torch.Tensor | None,
    scales: tuple[float, float],
) -> None:
    """Enqueue the kernels on the current stream of the device, which is the current one."""
    device = q.device
    batch_size, seq_len_q, num_heads_q, _ = q.shape
    num_sm_parts = metadata.shape[0]
    # What one part does alone is not split, however many queries there are.
    max_num_splits = batch_size + num_sm_parts if num_sm_parts > 1 else 0
    workspace = Scratch(module.library, device, max_num_splits, seq_len_q, num_heads_q, out.shape[3]).take()
    cache, indices, length = chosen.kernel_arguments()
    # Without a second cache its list is that of the first, of which nothing counts.
    second = (cache, indices, constant(device, batch_size, 0)) if extra is None else extra.kernel_arguments()
    _decode_of(module, num_heads_q)(
        q,
        cache,
        indices,
        length,
        *second,
        metadata,
        splits,
        out,
        lse,
        workspace.out_accum,
        workspace.lse_accum_log2,
        no_sink(device) if attn_sink is None else attn_sink,
        *scales,
        chosen.page_block_size,
        chosen.page_block_size if extra is None else extra.page_block_size,
        int(attn_sink is not None),
    )


def _decode_of(module: LoadedModule, num_heads_q: int) -> Callable[..., None]:
    """The program for that many heads: of an even number of tiles two and two share the conversion of their tokens."""
    tiles = -(-num_heads_q // module.manifest.spec["block_m"])
    name = "mla_sparse_decode" if tiles % 2 else "mla_sparse_decode_paired"
    return module.functions.get(name) or module.functions["mla_sparse_decode"]


def _check_chosen(
    prefix: str, q: torch.Tensor, is_fp8_kvcache: bool, k_cache: Any, indices: Any, topk_length: Any
) -> tuple[Chosen, str]:
    """A cache and the indices into it as kernels take them, and the cache's format."""
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
    page_block_size = k_cache.shape[1]
    k_cache = k_cache.detach()
    if kv_format == "dense":
        pages = k_cache[:, :, 0]
    else:
        pages = pages_of(k_cache_name, k_cache)
    return Chosen(pages, page_block_size, indices, topk_length), kv_format


def _find_schedule(
    tile_scheduler_metadata: Any,
    num_splits: Any,
    chosen: Chosen,
    extra: Chosen | None,
    config: SparseScheduleConfig,
    *,
    by_length: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The schedule of a call, made where it is not there yet: that of sequences of 64 tokens for each block."""

    def lengths() -> torch.Tensor:
        second = (None, None) if extra is None else (extra.indices, extra.topk_length)
        return count_tokens(chosen.indices, chosen.topk_length, *second)

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
    return metadata, splits


def _blocks_of(topk: int) -> int:
    return -(-topk // SCHEDULING_BLOCK)


def _check_schedule(metadata: torch.Tensor, splits: torch.Tensor, lengths: torch.Tensor, most: int) -> None:
    """Check a schedule in CPU memory: one for all of topk will do as well, for what is past a length names no token."""
    try:
        check_cpu_schedule(metadata, splits, torch.full_like(lengths, most))
    except ValueError:
        check_cpu_schedule(metadata, splits, lengths)

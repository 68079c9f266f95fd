"""Bad input is refused here, before anything is launched, naming the argument, what it must be and what it got.

Nothing here waits for a GPU: what only the values of CUDA tensors could tell is left unchecked. The values of CPU
tensors are checked, because a wrong page id would read memory that is not the caller's.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from tilemla.sched_meta import order_of
from tilemla.spec import ORDERED

# Elements that TMA moves at once: addresses and strides must be multiples of 16 bytes.
TMA_ALIGNMENT_ELEMENTS = 8
TMA_ALIGNMENT_BYTES = 16
# Tokens in a scheduling block, whatever the page size.
SCHEDULING_BLOCK = 64
METADATA_FIELDS = 8

_LSE_SCALES = {"e": math.log(2.0), "2": 1.0}


def describe(value: Any) -> str:
    """What an argument is, for a message."""
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(name: str, value: Any, rank: int, layout: str) -> torch.Tensor:
    """Return ``value`` if it is a tensor of ``rank`` dimensions, laid out as ``layout`` says in words."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, got {describe(value)}")
    if value.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions {layout}, got {describe(value)}")
    return value


def check_int32(name: str, value: torch.Tensor, device: torch.device) -> None:
    """Check that a tensor of indices or lengths is int32 and lies where q does."""
    if value.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, as q, got {describe(value)}")


def check_int(name: str, value: Any, at_least: int) -> int:
    """Return ``value`` if it is a plain integer that is large enough."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}")
    return value


def check_bool(name: str, value: Any) -> bool:
    """Return ``value`` if it is True or False."""
    if value is not True and value is not False:
        raise TypeError(f"{name} must be a bool, got {describe(value)}")
    return value


def check_softmax_scale(name: str, value: Any) -> None:
    """Check a factor of the scores: a number that is finite and not negative, or None."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or None, got {describe(value)}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_lse_base(lse_base: Any) -> float:
    """The log of 2 in the base that is asked for: what a base-2 logarithm is multiplied by."""
    if not isinstance(lse_base, str):
        raise TypeError(f"lse_base must be a str, 'e' or '2', got {describe(lse_base)}")
    if lse_base not in _LSE_SCALES:
        raise ValueError(f"lse_base must be 'e' or '2', got {lse_base!r}")
    return _LSE_SCALES[lse_base]


def check_cache_seqlens(cache_seqlens: Any) -> torch.Tensor:
    """Return lengths that come with no other tensor to compare with, if they are sound."""
    lengths = check_tensor("cache_seqlens", cache_seqlens, 1, "(batch_size,)")
    check_int32("cache_seqlens", lengths, lengths.device)
    if not lengths.is_contiguous():
        raise ValueError(f"cache_seqlens must be contiguous, got stride {lengths.stride()}")
    if lengths.device.type == "cpu":
        _check_lengths(lengths)
    return lengths


def check_decode_arguments(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: Any,
    softmax_scale: Any,
    causal: Any,
    *,
    in_bytes: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check everything about a decode call but the schedule and what kernels exist.

    Parameters
    ----------
    q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal
        As in ``flash_mla_with_kvcache``; of any type.
    in_bytes : bool
        Whether the cache is in a format of bytes, and was checked to be: it has neither q's dtype nor its width.

    Returns
    -------
    block_table, cache_seqlens : Tensor
        Those that may be None in upstream's signature, now known to be tensors.

    Raises
    ------
    TypeError
        On an argument of the wrong Python type or dtype.
    ValueError
        On a rank, shape, device, stride or value that does not fit.
    """
    check_tensor("q", q, 4, "(batch_size, seq_len_q, num_heads_q, head_dim_qk)")
    check_tensor("k_cache", k_cache, 4, "(num_blocks, page_block_size, num_heads_k, head_dim_qk)")
    check_tensor("block_table", block_table, 2, "(batch_size, max_num_blocks_per_seq)")
    check_tensor("cache_seqlens", cache_seqlens, 1, "(batch_size,)")
    batch_size, seq_len_q, num_heads_q, head_dim_qk = q.shape
    _, page_block_size, num_heads_k, head_dim_k = k_cache.shape
    device = q.device

    if k_cache.dtype is not q.dtype and not in_bytes:
        raise TypeError(f"k_cache must be {q.dtype}, as q, got {describe(k_cache)}")
    if k_cache.device != device:
        raise ValueError(f"k_cache must be on {device}, as q, got {describe(k_cache)}")
    check_int32("block_table", block_table, device)
    check_int32("cache_seqlens", cache_seqlens, device)

    if seq_len_q < 1:
        raise ValueError(f"q must have seq_len_q of at least 1, got {describe(q)}")
    if num_heads_k < 1 or page_block_size < 1:
        raise ValueError(f"k_cache must have a positive page_block_size and num_heads_k, got {describe(k_cache)}")
    if num_heads_q < 1 or num_heads_q % num_heads_k:
        raise ValueError(
            f"q must have num_heads_q that is a positive multiple of num_heads_k = {num_heads_k}, got {describe(q)}"
        )
    if head_dim_k != head_dim_qk and not in_bytes:
        raise ValueError(f"k_cache must have head_dim_qk = {head_dim_qk}, as q, got {describe(k_cache)}")
    if block_table.shape[0] != batch_size:
        raise ValueError(f"block_table must have batch_size = {batch_size} rows, got {describe(block_table)}")
    if cache_seqlens.shape[0] != batch_size:
        raise ValueError(f"cache_seqlens must have batch_size = {batch_size} elements, got {describe(cache_seqlens)}")
    check_int("head_dim_v", head_dim_v, 1)

    if q.stride(3) != 1:
        raise ValueError(f"q must have stride 1 in its last dimension, got strides {q.stride()}")
    if k_cache.stride(3) != 1:
        raise ValueError(f"k_cache must have stride 1 in its last dimension, got strides {k_cache.stride()}")
    if block_table.stride(1) != 1 and block_table.shape[1] > 1:
        raise ValueError(f"block_table must have stride 1 in its last dimension, got strides {block_table.stride()}")
    if not cache_seqlens.is_contiguous():
        raise ValueError(f"cache_seqlens must be contiguous, got stride {cache_seqlens.stride()}")

    check_bool("causal", causal)
    check_softmax_scale("softmax_scale", softmax_scale)
    return block_table, cache_seqlens


def check_tma_layout(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the queries or the cache as TMA can read them where they are; nothing is copied to make them fit.

    Raises
    ------
    ValueError
        On an address or a stride that is not a multiple of 16 bytes, or an expanded dimension.
    """
    if tensor.data_ptr() % TMA_ALIGNMENT_BYTES:
        raise ValueError(
            f"{name} must start at a multiple of 16 bytes, got address {tensor.data_ptr():#x}; copy it once"
        )
    strides, multiple = tensor.stride(), TMA_ALIGNMENT_BYTES // tensor.element_size()
    if all(strides) and not (strides[0] | strides[1] | strides[2]) % multiple:
        return tensor
    for size, stride in zip(tensor.shape[:3], strides, strict=False):
        if size > 1 and (stride % multiple or stride == 0):
            raise ValueError(
                f"{name} must have strides that are positive multiples of {multiple} elements "
                f"(16 bytes), got strides {strides}; make it contiguous or pad its rows"
            )
    # The stride of a dimension of one element says nothing, but TMA wants a good one.
    harmless = (s if size > 1 else tensor.shape[3] for size, s in zip(tensor.shape[:3], strides, strict=False))
    return tensor.as_strided(tensor.shape, (*harmless, 1))


def check_schedule_tensors(
    tile_scheduler_metadata: Any, num_splits: Any, batch_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tuple form of a schedule if it is sound, as far as shapes can tell.

    A padded tail of ``num_splits`` and idle parts in ``tile_scheduler_metadata`` are fine: callers copy a small
    batch's schedule into buffers made for their largest.
    """
    metadata = check_tile_scheduler_metadata(tile_scheduler_metadata, device)
    check_tensor("num_splits", num_splits, 1, "(batch_size + 1,)")
    check_int32("num_splits", num_splits, device)
    if num_splits.shape[0] < batch_size + 1:
        raise ValueError(
            f"num_splits must have at least batch_size + 1 = {batch_size + 1} elements, got {describe(num_splits)}; "
            "it was made for another batch"
        )
    if not num_splits.is_contiguous():
        raise ValueError(f"num_splits must be contiguous, got stride {num_splits.stride()}")
    return metadata, num_splits


def check_tile_scheduler_metadata(tile_scheduler_metadata: Any, device: torch.device) -> torch.Tensor:
    """Return the parts of a schedule if they are sound, as far as shapes can tell."""
    metadata = check_tensor("tile_scheduler_metadata", tile_scheduler_metadata, 2, f"(num_sm_parts, {METADATA_FIELDS})")
    check_int32("tile_scheduler_metadata", metadata, device)
    num_sm_parts, fields = metadata.shape
    if fields != METADATA_FIELDS or num_sm_parts < 1:
        raise ValueError(
            f"tile_scheduler_metadata must have shape (num_sm_parts, {METADATA_FIELDS}) with at least one part, "
            f"got {describe(metadata)}"
        )
    if not metadata.is_contiguous():
        raise ValueError(f"tile_scheduler_metadata must be contiguous, got strides {metadata.stride()}")
    return metadata


def _check_lengths(cache_seqlens: torch.Tensor) -> int:
    """Check that no length is negative; return the largest (0 for an empty batch)."""
    if cache_seqlens.shape[0] == 0:
        return 0
    lengths = cache_seqlens.numpy()
    shortest = int(lengths.min())
    if shortest < 0:
        raise ValueError(f"cache_seqlens must not be negative, got {shortest} for request {int(lengths.argmin())}")
    return int(lengths.max())


def _first_visible_tokens(cache_seqlens: Any, seq_len_q: int, window_left: int) -> Any:
    """The first token of each request that a query sees, as the kernels have it; 0 without a window."""
    if window_left < 0:
        return np.zeros_like(cache_seqlens)
    return np.maximum(cache_seqlens.astype(np.int64) - seq_len_q - window_left, 0)


def check_cpu_pages(
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    num_blocks: int,
    page_block_size: int,
    *,
    seq_len_q: int = 1,
    window_left: int = -1,
) -> None:
    """Check lengths and page ids of CPU tensors; entries past a request's end or before its window are not looked at.

    Raises
    ------
    ValueError
        When a length is negative or needs more pages than ``block_table`` is wide, or a page that is used is not one
        of the cache's.
    """
    longest = _check_lengths(cache_seqlens)
    width = block_table.shape[1]
    if longest > width * page_block_size:
        request = int(cache_seqlens.argmax())
        raise ValueError(
            f"block_table must have at least {-(-longest // page_block_size)} columns for cache_seqlens[{request}] = "
            f"{longest} with page_block_size {page_block_size}, got {describe(block_table)}"
        )
    if longest == 0:
        return
    lengths = cache_seqlens.numpy()
    first_pages = _first_visible_tokens(lengths, seq_len_q, window_left) // page_block_size
    end_pages = (lengths.astype(np.int64) + (page_block_size - 1)) // page_block_size
    table = block_table.numpy()
    columns = np.arange(width)
    used = table[(columns >= first_pages[:, None]) & (columns < end_pages[:, None])]
    if int(used.min()) < 0 or int(used.max()) >= num_blocks:
        _raise_page(table, first_pages.tolist(), end_pages.tolist(), num_blocks)


def _raise_page(table: Any, first_pages: list[int], end_pages: list[int], num_blocks: int) -> None:
    for request, (first, end) in enumerate(zip(first_pages, end_pages, strict=True)):
        for column, page in enumerate(table[request, first:end].tolist(), first):
            if not 0 <= page < num_blocks:
                raise ValueError(
                    f"block_table must hold page ids from 0 to num_blocks - 1 = {num_blocks - 1} where cache_seqlens "
                    f"says that they are used, got block_table[{request}, {column}] = {page}"
                )


def check_cpu_schedule(
    tile_scheduler_metadata: torch.Tensor,
    num_splits: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    seq_len_q: int = 1,
    window_left: int = -1,
    takes_order: bool = True,
) -> None:
    """Check that a schedule in CPU memory covers each block of each request that a query sees exactly once.

    With a window, blocks that lie before it may be covered or left out: a schedule may know of the window or not. It
    may visit the requests in an order of its own where kernels take that.

    Raises
    ------
    ValueError
        When it does not: the metadata was made for other lengths or another window, or has been changed.
    """
    batch_size = cache_seqlens.shape[0]
    lengths = cache_seqlens.numpy()
    num_blocks = ((lengths.astype(np.int64) + (SCHEDULING_BLOCK - 1)) // SCHEDULING_BLOCK).tolist()
    first_visible = (_first_visible_tokens(lengths, seq_len_q, window_left) // SCHEDULING_BLOCK).tolist()
    offsets = num_splits[: batch_size + 1].tolist()
    rows = tile_scheduler_metadata.tolist()
    order = list(range(batch_size))
    first_place = 0
    if any(row[0] >= ORDERED for row in rows):
        if not takes_order:
            _raise_schedule("it visits the requests in an order of its own, which calls with indices do not")
        order, first_place = order_of(tile_scheduler_metadata, batch_size).tolist(), ORDERED
        if sorted(order) != list(range(batch_size)):
            _raise_schedule(f"it visits the requests in the order {order}, which has not each of {batch_size} once")
    place = block = split = 0
    for part, row in enumerate(rows):
        begin, end_inclusive, begin_block, end_block, begin_split, first_is_split, last_is_split, _ = row
        if begin > end_inclusive:
            continue
        where = f"part {part} is {row}"
        begin, end_inclusive = begin - first_place, end_inclusive - first_place
        if end_inclusive >= batch_size:
            _raise_schedule(f"{where}, past the last of {batch_size} requests")
        request = order[min(place, batch_size - 1)]
        if (begin, begin_split) == (place, split) and split == 0 <= begin_block <= first_visible[request]:
            block = begin_block
        if (begin, begin_block, begin_split) != (place, block, split):
            _raise_schedule(f"{where}, but request {request} is covered up to block {block} in {split} splits")
        for place in range(begin, end_inclusive + 1):
            request = order[place]
            stop = end_block if place == end_inclusive else num_blocks[request]
            if not (block < stop <= num_blocks[request] or block == stop == num_blocks[request] == 0):
                _raise_schedule(f"{where}, but request {request} has blocks {block} to {num_blocks[request]} left")
            count = offsets[request + 1] - offsets[request]
            if place == begin and bool(first_is_split) != (count > 1):
                _raise_schedule(f"{where}, but num_splits gives request {request} {count} splits")
            if place == end_inclusive and bool(last_is_split) != (count > 1):
                _raise_schedule(f"{where}, but num_splits gives request {request} {count} splits")
            if stop == num_blocks[request]:
                if count != split + 1:
                    _raise_schedule(f"{where}, the {split + 1}. split of request {request}, of {count} in num_splits")
                block = split = 0
            else:
                block, split = stop, split + 1
        place = end_inclusive + (block == 0)
    if (place, block) != (batch_size, 0) or offsets[0] != 0:
        _raise_schedule(f"it ends after {place} requests, at block {block}, and num_splits starts at {offsets[0]}")


def _raise_schedule(found: str) -> None:
    raise ValueError(
        "tile_scheduler_metadata and num_splits must be a schedule for these cache_seqlens that covers each block of "
        f"64 tokens exactly once; {found}. They were made for other cache_seqlens, or another window"
    )

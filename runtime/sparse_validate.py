"""Bad input of calls with indices is refused here, naming the argument, what it must be and what it got.

The values of indices and lengths are not looked at, on no device: kernels take what names no token for no token.
"""

from __future__ import annotations

from typing import Any

import torch

from tilemla.kv_formats import FP8_LAYOUTS
from tilemla.validate import check_bool, check_int32, check_tensor, describe

# The format of bytes that goes with a head dim of the queries.
FP8_FORMATS = {layout.head_dim: name for name, layout in FP8_LAYOUTS.items()}
BYTE_DTYPES = (torch.float8_e4m3fn, torch.uint8, torch.int8)


def check_queries(q: Any, rank: int, layout: str) -> torch.Tensor:
    """Return queries, (…, num_heads_q, head_dim_qk), if they are sound by themselves."""
    check_tensor("q", q, rank, layout)
    if rank == 4 and q.shape[1] < 1:
        raise ValueError(f"q must have seq_len_q of at least 1, got {describe(q)}")
    if q.shape[-2] < 1:
        raise ValueError(f"q must have num_heads_q of at least 1, got {describe(q)}")
    if q.stride(-1) != 1:
        raise ValueError(f"q must have stride 1 in its last dimension, got strides {q.stride()}")
    return q  # type: ignore[no-any-return]


def check_indices(name: str, indices: Any, layout: str, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return indices, (*shape, topk), if they fit the queries."""
    check_tensor(name, indices, 3, layout)
    check_int32(name, indices, device)
    if tuple(indices.shape[:2]) != shape:
        raise ValueError(f"{name} must have shape {layout} = {(*shape, 'any')}, got {describe(indices)}")
    if indices.shape[2] > 1 and indices.stride(2) != 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got strides {indices.stride()}")
    return indices  # type: ignore[no-any-return]


def check_lengths(name: str, lengths: Any, layout: str, count: int, device: torch.device) -> torch.Tensor:
    """Return how many indices count, ``(count,)``, if they fit."""
    check_tensor(name, lengths, 1, layout)
    check_int32(name, lengths, device)
    if lengths.shape[0] != count:
        raise ValueError(f"{name} must have {layout} = {count} elements, got {describe(lengths)}")
    if not lengths.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {lengths.stride()}")
    return lengths  # type: ignore[no-any-return]


def check_byte_cache(name: str, k_cache: torch.Tensor, kv_format: str, where: str) -> None:
    """Check a cache in one of FlashMLA's formats of bytes; its rank is right, and `where` says what asks for it."""
    width = FP8_LAYOUTS[kv_format].bytes_per_token
    if k_cache.dtype not in BYTE_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in BYTE_DTYPES)
        raise TypeError(f"{name} must be one of {known} where {where}, got {describe(k_cache)}")
    if k_cache.shape[3] != width:
        raise ValueError(
            f"{name} must have {width} bytes a token, shape (num_blocks, page_block_size, 1, {width}), where "
            f"{where}, got {describe(k_cache)}; quantize_k_cache makes such a cache"
        )
    if k_cache.stride(3) != 1 or (k_cache.shape[1] > 1 and k_cache.stride(1) != width):
        raise ValueError(
            f"{name} must hold the bytes of a page one after the other, strides (any, {width}, any, 1), "
            f"got strides {k_cache.stride()}"
        )


def check_pages(name: str, k_cache: torch.Tensor) -> None:
    """Check that the pages of a cache of bytes, checked otherwise, do not overlap."""
    num_blocks, page_block_size, _, width = k_cache.shape
    num_bytes = page_block_size * width
    if num_blocks > 1 and k_cache.stride(0) < num_bytes:
        raise ValueError(
            f"{name} must have pages that do not overlap, {num_bytes} bytes or more apart, "
            f"got strides {k_cache.stride()}"
        )


def pages_of(name: str, k_cache: torch.Tensor) -> torch.Tensor:
    """The pages of a cache of bytes that was checked otherwise, (num_blocks, bytes) uint8, each in a row."""
    check_pages(name, k_cache)
    num_blocks, page_block_size, _, width = k_cache.shape
    return k_cache.view(torch.uint8).as_strided((num_blocks, page_block_size * width), (k_cache.stride(0), 1))


def check_one_head(name: str, k_cache: Any, device: torch.device, beside: str) -> torch.Tensor:
    """Return a paged cache with one KV head on the device of the argument `beside`, of any dtype and width."""
    check_tensor(name, k_cache, 4, "(num_blocks, page_block_size, 1, head_dim_qk or bytes of a token)")
    if k_cache.device != device:
        raise ValueError(f"{name} must be on {device}, as {beside}, got {describe(k_cache)}")
    if k_cache.shape[1] < 1:
        raise ValueError(f"{name} must have a positive page_block_size, got {describe(k_cache)}")
    if k_cache.shape[2] != 1:
        raise ValueError(f"{name} must have num_heads_k = 1 for sparse and fp8 caches, got {describe(k_cache)}")
    return k_cache  # type: ignore[no-any-return]


def check_chosen_cache(name: str, k_cache: Any, q: torch.Tensor, is_fp8_kvcache: bool) -> str:
    """Check a paged cache whose tokens are named by indices; return its format, in a spec's words.

    Raises
    ------
    NotImplementedError
        Where there is no format of bytes for the head dim of the queries.
    """
    check_one_head(name, k_cache, q.device, "q")
    head_dim_qk = q.shape[-1]
    if is_fp8_kvcache:
        if head_dim_qk not in FP8_FORMATS:
            known = " or ".join(map(str, sorted(FP8_FORMATS)))
            raise NotImplementedError(f"q must have head dim {known} where is_fp8_kvcache is True, got {describe(q)}")
        where = f"is_fp8_kvcache is True and q has head dim {head_dim_qk}"
        check_byte_cache(name, k_cache, FP8_FORMATS[head_dim_qk], where)
        return FP8_FORMATS[head_dim_qk]
    if k_cache.dtype is not q.dtype:
        hint = "; is_fp8_kvcache=True is for caches of bytes" if k_cache.dtype in BYTE_DTYPES else ""
        raise TypeError(f"{name} must be {q.dtype}, as q, got {describe(k_cache)}{hint}")
    if k_cache.shape[3] != head_dim_qk:
        raise ValueError(f"{name} must have head_dim_qk = {head_dim_qk}, as q, got {describe(k_cache)}")
    if k_cache.stride(3) != 1:
        raise ValueError(f"{name} must have stride 1 in its last dimension, got strides {k_cache.stride()}")
    return "dense"


def check_descale(name: str, value: Any, device: torch.device) -> torch.Tensor:
    """Return what e4m3 elements are multiplied by, (1,) float32."""
    check_tensor(name, value, 1, "(1,)")
    if value.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, got {describe(value)}")
    if value.shape[0] != 1:
        raise ValueError(f"{name} must have one element, shape (1,), got {describe(value)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, as q, got {describe(value)}")
    return value.detach()  # type: ignore[no-any-return]


def check_no_mask(causal: Any, window_size: tuple[int, int]) -> None:
    """Check that nothing is masked by position beside indices, which say themselves what a query sees."""
    if check_bool("causal", causal):
        raise ValueError("causal must be False beside indices, which say themselves what a query sees, got True")
    if window_size != (-1, -1):
        raise ValueError(
            f"window_size must be (-1, -1) beside indices, which say themselves what a query sees, got {window_size}"
        )


def check_no_indices(extra_k_cache: Any, extra_indices: Any, topk_length: Any, extra_topk_length: Any) -> None:
    """Check that a call without indices has nothing that belongs to them."""
    for name, value in (
        ("extra_k_cache", extra_k_cache),
        ("extra_indices_in_kvcache", extra_indices),
        ("topk_length", topk_length),
        ("extra_topk_length", extra_topk_length),
    ):
        if value is not None:
            raise ValueError(f"{name} must be None without indices, got {describe(value)}")

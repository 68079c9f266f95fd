"""Between a plain cache and FlashMLA's FP8 formats, in torch: for tests, conversions and small caches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tilemla.kv_formats import FP8_LAYOUTS, Fp8Layout
from tilemla.validate import check_tensor, describe

_E4M3_MAX = 448.0
# A tile of zeros has a scale, too: FlashMLA's least.
_LEAST_SCALE = 1e-4
_CACHE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BYTE_DTYPES = (torch.float8_e4m3fn, torch.uint8, torch.int8)


class _Parts(NamedTuple):
    """Views of a quantised cache, each (num_blocks, page_block_size, elements); scales are float32 or bytes of e8m0."""

    nope: torch.Tensor
    scales: torch.Tensor
    rope: torch.Tensor


def quantize_k_cache(k_cache: torch.Tensor, kv_format: str = "fp8_656") -> torch.Tensor:
    """Quantise a paged cache to one of FlashMLA's formats for FP8 caches.

    The scale of a tile is the least power of two, from 2 ** -13 on, that brings its largest magnitude to 448 or less.

    Parameters
    ----------
    k_cache : Tensor, (num_blocks, page_block_size, 1, head_dim), bfloat16, float16 or float32
        Of any strides; head_dim is 576 for ``"fp8_656"``, 512 for ``"fp8_584"``. The last 64 elements are kept in
        bfloat16. A tile with an element that is not finite becomes NaN as a whole.
    kv_format : {"fp8_656", "fp8_584"}
        By the bytes of a token.

    Returns
    -------
    Tensor, (num_blocks, page_block_size, 1, bytes of a token), float8_e4m3fn
        A new cache on the same device; with ``"fp8_584"`` its pages begin at multiples of 576 bytes and a token's
        scales are not among the bytes at its index: the page's come last.

    Raises
    ------
    TypeError, ValueError
        On a format that does not exist, or a cache that does not fit it.
    """
    layout = _layout_of(kv_format)
    _check_cache(k_cache, layout.head_dim, _CACHE_DTYPES, kv_format)
    num_blocks, page_block_size, _, _ = k_cache.shape
    stride = layout.bytes_per_page(page_block_size)
    pages = torch.zeros((num_blocks, stride), dtype=torch.uint8, device=k_cache.device)
    parts = _parts_of(pages, page_block_size, layout)
    values = k_cache.detach()[:, :, 0]
    parts.rope.copy_(values[..., layout.head_dim_nope :])
    tiles = _in_tiles(values[..., : layout.head_dim_nope], layout)
    scales = _power_of_two_from((tiles.abs().amax(-1) / _E4M3_MAX).clamp_min(_LEAST_SCALE))
    parts.scales.copy_(_e8m0_of(scales) if layout.scales_apart else scales)
    parts.nope.copy_((tiles / scales.unsqueeze(-1)).flatten(-2))
    return pages.view(torch.float8_e4m3fn).as_strided(
        (num_blocks, page_block_size, 1, layout.bytes_per_token),
        (stride, layout.bytes_per_token, layout.bytes_per_token, 1),
    )


def dequantize_k_cache(
    k_cache: torch.Tensor, kv_format: str = "fp8_656", dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """Make a plain cache of one in FlashMLA's formats for FP8 caches.

    Parameters
    ----------
    k_cache : Tensor, (num_blocks, page_block_size, 1, bytes of a token), float8_e4m3fn, uint8 or int8
        As ``quantize_k_cache`` returns it. The bytes of a page are one after the other, pages are any distance apart.
    kv_format : {"fp8_656", "fp8_584"}
        By the bytes of a token.
    dtype : torch.dtype
        Of the result: bfloat16 or float16, to which products are rounded once, or float32, in which they are exact
        where a scale is a power of two.

    Returns
    -------
    Tensor, (num_blocks, page_block_size, 1, head_dim), dtype

    Raises
    ------
    TypeError, ValueError
        On a format that does not exist, or a cache or dtype that does not fit.
    """
    layout = _layout_of(kv_format)
    _check_cache(k_cache, layout.bytes_per_token, _BYTE_DTYPES, kv_format)
    if dtype not in _CACHE_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, _CACHE_DTYPES))}, got {dtype!r}")
    num_blocks, page_block_size, _, _ = k_cache.shape
    width = layout.bytes_per_token
    if k_cache.stride(3) != 1 or (page_block_size > 1 and k_cache.stride(1) != width):
        raise ValueError(
            f"k_cache must hold the bytes of a page one after the other, strides (any, {width}, any, 1), "
            f"got strides {k_cache.stride()}"
        )
    pages = k_cache.detach().view(torch.uint8).as_strided((num_blocks, page_block_size * width), (k_cache.stride(0), 1))
    # A copy is aligned, as reading four bytes as a scale asks for, wherever the cache begins.
    parts = _parts_of(pages.clone(memory_format=torch.contiguous_format), page_block_size, layout)
    scales = _float_of_e8m0(parts.scales) if layout.scales_apart else parts.scales
    nope = _in_tiles(parts.nope, layout) * scales.unsqueeze(-1)
    return torch.cat([nope.flatten(-2).to(dtype), parts.rope.to(dtype)], dim=-1).unsqueeze(2)


def _layout_of(kv_format: Any) -> Fp8Layout:
    if not isinstance(kv_format, str):
        raise TypeError(f"kv_format must be a str, got {describe(kv_format)}")
    if kv_format not in FP8_LAYOUTS:
        raise ValueError(f"kv_format must be one of {', '.join(FP8_LAYOUTS)}, got {kv_format!r}")
    return FP8_LAYOUTS[kv_format]


def _check_cache(k_cache: Any, width: int, dtypes: tuple[torch.dtype, ...], kv_format: str) -> None:
    check_tensor("k_cache", k_cache, 4, f"(num_blocks, page_block_size, 1, {width})")
    if k_cache.dtype not in dtypes:
        raise TypeError(f"k_cache must be one of {', '.join(map(str, dtypes))}, got {describe(k_cache)}")
    if k_cache.shape[2:] != (1, width):
        raise ValueError(
            f"k_cache must have shape (num_blocks, page_block_size, 1, {width}) for {kv_format}, "
            f"got {describe(k_cache)}"
        )


def _parts_of(pages: torch.Tensor, page_block_size: int, layout: Fp8Layout) -> _Parts:
    """Views of the parts of pages, (num_blocks, page_block_size * bytes_per_token or more) of bytes."""
    nope, rope = layout.head_dim_nope, 2 * layout.head_dim_rope
    by_token = (pages.shape[0], page_block_size)
    end = page_block_size * layout.bytes_per_token
    if layout.scales_apart:
        first_scale = page_block_size * (nope + rope)
        tokens = pages[:, :first_scale].view(*by_token, nope + rope)
        scales = pages[:, first_scale:end].view(*by_token, layout.scale_bytes)
        return _Parts(
            tokens[..., :nope].view(torch.float8_e4m3fn),
            scales[..., : layout.num_tiles],
            tokens[..., nope:].view(torch.bfloat16),
        )
    tokens = pages[:, :end].view(*by_token, layout.bytes_per_token)
    return _Parts(
        tokens[..., :nope].view(torch.float8_e4m3fn),
        tokens[..., nope : nope + layout.scale_bytes].view(torch.float32),
        tokens[..., nope + layout.scale_bytes :].view(torch.bfloat16),
    )


def _in_tiles(values: torch.Tensor, layout: Fp8Layout) -> torch.Tensor:
    """(num_blocks, page_block_size, head_dim_nope) as float32 (num_blocks, page_block_size, num_tiles, tile)."""
    return values.float().view(*values.shape[:2], layout.num_tiles, layout.tile)


def _power_of_two_from(values: torch.Tensor) -> torch.Tensor:
    """The least power of two that is not less than each value; what is not finite becomes NaN."""
    mantissa, exponent = torch.frexp(values)  # values = mantissa * 2 ** exponent, mantissa from 1/2 on
    powers = torch.ldexp(torch.ones_like(values), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(values.isfinite(), powers, torch.nan)


# torch has a dtype for e8m0 from 2.7 on only.
def _e8m0_of(scales: torch.Tensor) -> torch.Tensor:
    """The bytes of powers of two or NaN, float32: their exponents, as NaN's is e8m0's NaN."""
    return scales.view(torch.int32).bitwise_right_shift(23).bitwise_and(255).to(torch.uint8)


def _float_of_e8m0(scales: torch.Tensor) -> torch.Tensor:
    """The float32 values of bytes."""
    powers = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    return torch.where(scales == 255, torch.nan, powers)

"""Stored elements and cached tokens as float32, in C.

The c target has neither bfloat16 nor fp8: such tensors are declared by their bits, and floats are put together by shift
and reinterpretation. What a token is read from is given as functions of an element's or a byte's place in it, so that a
format is written once, whether tokens are found by a block table or by an index.
"""

from collections.abc import Callable
from typing import Any

import tilelang.language as T

from tilemla.kv_formats import FP8_LAYOUTS

# What lies at a place.
At = Callable[[Any], Any]

_FLOAT32_MANTISSA_BITS = 23
# e4m3: a sign, four bits of exponent with a bias of 7, three of mantissa.
_E4M3_MANTISSA_BITS = 3
_EXPONENT_BIAS_DIFFERENCE = 127 - 7
_E4M3_LEAST = 2.0**-9
_QUIET_NAN = 0x7FC00000


def storage_of(dtype) -> str:
    """What a tensor of a dtype is declared as."""
    return "uint16" if dtype == "bfloat16" else dtype


def widen(value, dtype) -> Any:
    """A stored element as float32."""
    if dtype == "bfloat16":
        return T.reinterpret(T.shift_left(T.cast(value, "uint32"), T.uint32(16)), "float32")
    return T.cast(value, "float32")


def narrow(value, dtype) -> Any:
    """A float32 as a stored element, rounded to nearest even; NaN stays NaN."""
    if dtype == "bfloat16":
        bits = T.reinterpret(value, "uint32")
        rounded = bits + T.uint32(0x7FFF) + (T.shift_right(bits, T.uint32(16)) & T.uint32(1))
        is_nan = (bits & T.uint32(0x7FFFFFFF)) > T.uint32(0x7F800000)
        quiet_nan = bits | T.uint32(0x400000)
        return T.cast(T.shift_right(T.if_then_else(is_nan, quiet_nan, rounded), T.uint32(16)), "uint16")
    return T.cast(value, "float16")


@T.macro
def widen_e4m3(stored) -> Any:
    """An e4m3, given as uint8, as float32; without a denormal on the way, which a process may have set to be 0."""
    byte = T.cast(stored, "uint32")
    magnitude = byte & T.uint32(0x7F)
    shifted = T.shift_left(magnitude, T.uint32(_FLOAT32_MANTISSA_BITS - _E4M3_MANTISSA_BITS))
    normal = T.reinterpret(shifted + T.uint32(_EXPONENT_BIAS_DIFFERENCE << _FLOAT32_MANTISSA_BITS), "float32")
    denormal = T.cast(magnitude, "float32") * T.float32(_E4M3_LEAST)
    finite = T.Select(magnitude < T.uint32(1 << _E4M3_MANTISSA_BITS), denormal, normal)
    value = T.Select(magnitude == T.uint32(0x7F), T.reinterpret(T.uint32(_QUIET_NAN), "float32"), finite)
    return T.Select(byte >= T.uint32(0x80), -value, value)


@T.macro
def _widen_e8m0(stored) -> Any:
    """A power of two, 2**(stored - 127), as float32, `stored` being a uint8; 255 is NaN and 0 a denormal."""
    byte = T.cast(stored, "uint32")
    bits = T.shift_left(byte, T.uint32(_FLOAT32_MANTISSA_BITS))
    finite = T.Select(byte == T.uint32(0), T.uint32(1 << (_FLOAT32_MANTISSA_BITS - 1)), bits)
    return T.reinterpret(T.Select(byte == T.uint32(255), T.uint32(_QUIET_NAN), finite), "float32")


def _join_bytes(at, first, count) -> Any:
    """The uint32 of `count` bytes from place `first` on, the least significant first, wherever they are aligned."""
    joined = T.cast(at(first), "uint32")
    for i in range(1, count):
        joined = joined | T.shift_left(T.cast(at(first + i), "uint32"), T.uint32(8 * i))
    return joined


def token_in_page(kcache, page, offset, page_block_size, kv_format) -> tuple[At, At]:
    """Where the bytes of a token of a page lie in a cache of (num_pages, bytes_per_page).

    Returns
    -------
    (callable, callable)
        The uint8 at a place of the token, its scales left out where they lie apart, and the float32 scale of a tile.
    """
    layout = FP8_LAYOUTS[kv_format]

    def at(place) -> Any:
        return kcache[page, offset * layout.bytes_apart + place]

    def scale_at(tile) -> Any:
        return _widen_e8m0(kcache[page, page_block_size * layout.bytes_apart + offset * layout.scale_bytes + tile])

    return at, scale_at if layout.scales_apart else scale_in_token(at, kv_format)


def scale_in_token(at, kv_format) -> At:
    """The float32 scale of a tile, where a token holds its scales itself: four bytes each, after the e4m3."""
    layout = FP8_LAYOUTS[kv_format]
    return lambda tile: T.reinterpret(_join_bytes(at, layout.head_dim_nope + tile * 4, 4), "float32")


def make_token_reader(kv_format, dtype, head_dim) -> Any:
    """How a token becomes a row of float32.

    Returns
    -------
    macro
        ``read_token(tokens, j, at, scale_at)`` writes row `j`. `at` gives the stored element, or the byte, at a place
        of the token, and `scale_at`, None where there are none, the scale of a tile.
    """
    if kv_format in ("dense", "dense_fp8"):

        @T.macro
        def read_elements(tokens, j, at, scale_at):
            for d in T.serial(head_dim):
                tokens[j, d] = widen_e4m3(at(d)) if kv_format == "dense_fp8" else widen(at(d), dtype)

        return read_elements

    layout = FP8_LAYOUTS[kv_format]
    first_rope = layout.head_dim_nope + (0 if layout.scales_apart else layout.scale_bytes)

    @T.macro
    def read_quantized(tokens, j, at, scale_at):
        scale = T.alloc_local((1,), "float32")
        for tile in T.serial(layout.num_tiles):
            scale[0] = scale_at(tile)
            for d in T.serial(layout.tile):
                place = tile * layout.tile + d
                tokens[j, place] = widen_e4m3(at(place)) * scale[0]
        for d in T.serial(layout.head_dim_rope):
            tokens[j, layout.head_dim_nope + d] = widen(_join_bytes(at, first_rope + 2 * d, 2), "bfloat16")

    return read_quantized

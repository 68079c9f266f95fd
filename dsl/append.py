"""Quantising new tokens into a paged cache of bytes, to the bits that ``tilemla.quantize_k_cache`` makes.

The scale of a tile is the least power of two, from 2**-13 on, that brings its largest magnitude to 448 or less. An
element that is not finite makes its tile NaN. Floats are taken apart by shift, so that there is one text for every
target.
"""

from types import SimpleNamespace
from typing import Any

import tilelang.language as T

from tilemla.dsl.program import Program
from tilemla.dsl.tokens_cpu import narrow, storage_of, widen
from tilemla.kv_formats import FP8_LAYOUTS

_E4M3_MAX = 448.0
_LEAST_SCALE = 1e-4
_QUIET_NAN = 0x7FC00000
_INFINITY = 0x7F800000
_WARP = 32
_WARPS = 4
_THREADS = _WARP * _WARPS


def scale_bits(largest) -> Any:
    """The bits of a tile's float32 scale from the bits of its largest magnitude, both uint32; NaN for inf and NaN.

    The next power of two is reached by a carry out of the mantissa.
    """
    least = T.max(T.reinterpret(largest, "float32") / T.float32(_E4M3_MAX), T.float32(_LEAST_SCALE))
    power = (T.reinterpret(least, "uint32") + T.uint32(0x7FFFFF)) & T.uint32(0xFF800000)
    return T.Select(largest >= T.uint32(_INFINITY), T.uint32(_QUIET_NAN), power)


@T.macro
def narrow_e4m3(value) -> Any:
    """A float32 of up to 448 in magnitude as the byte of an e4m3, uint32, rounded to nearest even; NaN stays NaN."""
    bits = T.reinterpret(value, "uint32")
    magnitude = bits & T.uint32(0x7FFFFFFF)
    # Seven bits of a float whose exponent is 120 less; the first that is left out rounds, a tie to even.
    rounded = magnitude + T.uint32(0x7FFFF) + (T.shift_right(magnitude, T.uint32(20)) & T.uint32(1))
    normal = T.min(T.shift_right(rounded, T.uint32(20)) - T.uint32(120 << 3), T.uint32(0x7E))
    # Below 2**-6 the last bit is worth 2**-9, as that of a float32 from 2**14 on.
    shifted = T.reinterpret(magnitude, "float32") + T.float32(2.0**14)
    denormal = T.reinterpret(shifted, "uint32") - T.uint32(0x46800000)
    finite = T.Select(magnitude < T.uint32((127 - 6) << 23), denormal, normal)
    byte = T.Select(magnitude > T.uint32(_INFINITY), T.uint32(0x7F), finite)
    return byte | (T.shift_right(bits, T.uint32(24)) & T.uint32(0x80))


def _places(spec) -> SimpleNamespace:
    """Where the parts of a token begin in a page, as functions of its place in it."""
    layout = FP8_LAYOUTS[spec.kv_format]
    rope = layout.head_dim_nope + (0 if layout.scales_apart else layout.scale_bytes)
    return SimpleNamespace(
        nope=lambda offset: offset * layout.bytes_apart,
        rope=lambda offset: offset * layout.bytes_apart + rope,
        scales=lambda offset, page_block_size: (
            page_block_size * layout.bytes_apart + offset * layout.scale_bytes
            if layout.scales_apart
            else offset * layout.bytes_apart + layout.head_dim_nope
        ),
    )


def make_append_program_cpu(spec) -> Program:
    """Quantise tokens into a cache, in C.

    Parameters
    ----------
    spec : KernelSpec
        Of which the dtype and the format of the cache count.

    Returns
    -------
    Program
        ``append_kv(latent (n, head_dim_qk), slot_mapping (n,) int64, kcache (num_pages, bytes_per_page) uint8,
        page_block_size)``: token i goes to slot ``page * page_block_size + offset``; slots that are negative or past
        the cache are left out. latent and kcache may be strided with a last stride of 1; bfloat16 tensors are declared
        uint16. A byte that pads a token's scales is made 0.
    """
    dtype, layout, places = spec.dtype, FP8_LAYOUTS[spec.kv_format], _places(spec)
    n, num_pages, bytes_per_page = T.dynamic("n, num_pages, bytes_per_page")
    latent_stride, k_stride_page = T.dynamic("latent_stride, k_stride_page")
    scale_bytes = 1 if layout.scales_apart else 4

    @T.macro
    def write_bytes(kcache, page, place, bits, count):
        for i in T.unroll(count):
            kcache[page, place + i] = T.cast(T.shift_right(bits, T.uint32(8 * i)) & T.uint32(0xFF), "uint8")

    @T.prim_func
    def append_kv(
        latent: T.StridedTensor((n, layout.head_dim), (latent_stride, 1), storage_of(dtype)),
        slot_mapping: T.Tensor((n,), "int64"),
        kcache: T.StridedTensor((num_pages, bytes_per_page), (k_stride_page, 1), "uint8"),
        page_block_size: T.int32,
    ):
        with T.Kernel(n, threads=1) as token:
            largest = T.alloc_local((1,), "uint32")
            scale = T.alloc_local((1,), "uint32")
            slot = slot_mapping[token]
            if (slot >= 0) & (slot < T.cast(num_pages, "int64") * page_block_size):
                page = T.cast(T.truncdiv(slot, T.cast(page_block_size, "int64")), "int32")
                offset = T.cast(T.truncmod(slot, T.cast(page_block_size, "int64")), "int32")
                for tile in T.serial(layout.num_tiles):
                    largest[0] = T.uint32(0)
                    for d in T.serial(layout.tile):
                        value = widen(latent[token, tile * layout.tile + d], dtype)
                        # Of floats without sign, the larger has the larger bits; NaN's are the largest.
                        largest[0] = T.max(largest[0], T.reinterpret(value, "uint32") & T.uint32(0x7FFFFFFF))
                    scale[0] = scale_bits(largest[0])
                    for d in T.serial(layout.tile):
                        value = widen(latent[token, tile * layout.tile + d], dtype)
                        byte = narrow_e4m3(value / T.reinterpret(scale[0], "float32"))
                        kcache[page, places.nope(offset) + tile * layout.tile + d] = T.cast(byte, "uint8")
                    if layout.scales_apart:  # e8m0 is the exponent
                        scale[0] = T.shift_right(scale[0], T.uint32(23))
                    write_bytes(
                        kcache, page, places.scales(offset, page_block_size) + tile * scale_bytes, scale[0], scale_bytes
                    )
                for i in T.serial(layout.scale_bytes - layout.num_tiles * scale_bytes):
                    place = places.scales(offset, page_block_size) + layout.num_tiles * scale_bytes + i
                    kcache[page, place] = T.cast(0, "uint8")
                for d in T.serial(layout.head_dim_rope):
                    value = widen(latent[token, layout.head_dim_nope + d], dtype)
                    bits = T.cast(narrow(value, "bfloat16"), "uint32")
                    write_bytes(kcache, page, places.rope(offset) + 2 * d, bits, 2)

    return Program(append_kv, {"tl.disable_safe_memory_legalize": True})


def make_append_program_cuda(spec) -> Program:
    """Quantise tokens into a cache, a CTA for each token and a warp for each tile.

    Parameters
    ----------
    spec : KernelSpec
        Of which the dtype and the format of the cache count.

    Returns
    -------
    Program
        As `make_append_program_cpu`, but latent is of the spec's dtype.
    """
    layout, places = FP8_LAYOUTS[spec.kv_format], _places(spec)
    n, num_pages, bytes_per_page = T.dynamic("n, num_pages, bytes_per_page")
    latent_stride, k_stride_page = T.dynamic("latent_stride, k_stride_page")
    scale_bytes = 1 if layout.scales_apart else 4
    per_lane = layout.tile // _WARP
    rope_per_thread = -(-layout.head_dim_rope // _THREADS)

    @T.prim_func
    def append_kv(
        latent: T.StridedTensor((n, layout.head_dim), (latent_stride, 1), spec.dtype),
        slot_mapping: T.Tensor((n,), "int64"),
        kcache: T.StridedTensor((num_pages, bytes_per_page), (k_stride_page, 1), "uint8"),
        page_block_size: T.int32,
    ):
        with T.Kernel(n, threads=_THREADS) as token:
            values = T.alloc_local((per_lane,), "float32")
            largest = T.alloc_var("int32", init=0)
            scale = T.alloc_var("uint32", init=T.uint32(0))
            tx = T.get_thread_binding()
            warp, lane = tx // _WARP, tx % _WARP
            slot = slot_mapping[token]
            if (slot >= 0) & (slot < T.cast(num_pages, "int64") * page_block_size):
                page = T.cast(T.truncdiv(slot, T.cast(page_block_size, "int64")), "int32")
                offset = T.cast(T.truncmod(slot, T.cast(page_block_size, "int64")), "int32")
                for step in T.serial(-(-layout.num_tiles // _WARPS)):
                    tile = step * _WARPS + warp
                    if tile < layout.num_tiles:  # all of a warp, or none of it
                        first = tile * layout.tile + lane * per_lane
                        largest = 0
                        for i in T.unroll(per_lane):
                            values[i] = T.cast(latent[token, first + i], "float32")
                            # As in C; without its sign a float is a positive int32.
                            largest = T.max(largest, T.reinterpret(values[i], "int32") & 0x7FFFFFFF)
                        for i in T.unroll(5):
                            largest = T.max(largest, T.shfl_xor(largest, 1 << i))
                        scale = scale_bits(T.reinterpret(largest, "uint32"))
                        for i in T.unroll(per_lane):
                            byte = narrow_e4m3(values[i] / T.reinterpret(scale, "float32"))
                            kcache[page, places.nope(offset) + first + i] = T.cast(byte, "uint8")
                        if layout.scales_apart:
                            scale = T.shift_right(scale, T.uint32(23))
                        if lane < scale_bytes:
                            place = places.scales(offset, page_block_size) + tile * scale_bytes + lane
                            kcache[page, place] = T.cast(
                                T.shift_right(scale, T.cast(8 * lane, "uint32")) & T.uint32(0xFF), "uint8"
                            )
                if tx < layout.scale_bytes - layout.num_tiles * scale_bytes:
                    place = places.scales(offset, page_block_size) + layout.num_tiles * scale_bytes + tx
                    kcache[page, place] = T.cast(0, "uint8")
                for step in T.serial(rope_per_thread):
                    d = step * _THREADS + tx
                    if d < layout.head_dim_rope:
                        value = T.cast(latent[token, layout.head_dim_nope + d], "float32")
                        bits = T.cast(narrow(value, "bfloat16"), "uint32")
                        kcache[page, places.rope(offset) + 2 * d] = T.cast(bits & T.uint32(0xFF), "uint8")
                        kcache[page, places.rope(offset) + 2 * d + 1] = T.cast(
                            T.shift_right(bits, T.uint32(8)) & T.uint32(0xFF), "uint8"
                        )

    return Program(
        append_kv,
        {
            "tl.disable_thread_storage_sync": True,
            "tl.disable_warp_specialized": True,
            "tl.disable_safe_memory_legalize": True,
        },
    )

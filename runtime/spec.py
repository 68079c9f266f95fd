"""What a module is specialised on. Standard library only: every room of the house shares these words."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

# What a module is for, and its programs. `read_pages` serves no call: the benchmark compares with it.
KERNELS = {
    "mla_decode": (
        "get_mla_metadata",
        "get_batch_invariant_metadata",
        "mla_decode",
        "mla_decode_plain",
        "merge_states",
    ),
    "mla_sparse_decode": ("get_mla_metadata", "get_batch_invariant_metadata", "mla_sparse_decode"),
    "mla_sparse_prefill": ("mla_sparse_prefill",),
    "read_pages": ("read_pages",),
}
# Programs into which a module exports a second way, `<program>_unfolded`.
UNFOLDED_PROGRAMS = ("mla_decode", "mla_decode_plain", "mla_decode_narrow")
# What modules for sparse decode of a cache of bytes have besides: new tokens are quantised into it.
_APPENDING = ("append_kv",)
# And where thread blocks form clusters: two tiles of heads that convert the tokens of a block together.
_PAIRED = ("mla_sparse_decode_paired",)
# What a module for decode of a cache of bytes has besides on sm_90a: a program for few rows.
_NARROW = ("mla_decode_narrow",)
# Rows of a query tile of that program.
NARROW_ROWS = 16
# The first place of a tile schedule that visits the requests in an order of its own; no batch is as large.
ORDERED = 1 << 30
# Those that results were compared on: what is built unless others are asked for.
TESTED_ARCHS = ("sm_90a", "cpu")
ARCHS = (*TESTED_ARCHS, "sm_80", "sm_89", "sm_100", "sm_120")
DTYPES = ("bfloat16", "float16")
# "dense": elements of dtype. "dense_fp8": queries and cache e4m3, with one scale each. Else by the bytes of a token, as
# in `kv_formats`.
KV_FORMATS = ("dense", "dense_fp8", "fp8_656", "fp8_584")
# (head_dim_qk, head_dim_v); the rope part of a key is the difference.
HEAD_DIMS = ((576, 512), (512, 512))
PAGE_BLOCK_SIZES = (1, 16, 32, 64, 128, 256)
# Rows of a query tile: wgmma multiplies 64 rows at a time, a CPU core keeps fewer rows in its cache, and where tensor
# cores are fed by ldmatrix alone four warps hold an accumulator of 32 rows.
BLOCK_M = {"sm_90a": 64, "cpu": 16, "sm_80": 32, "sm_89": 32, "sm_100": 32, "sm_120": 32}

# The architectures that there are programs for, by kernel and layout of the cache.
_WRITTEN_FOR: dict[tuple[str, str], tuple[str, ...]] = {
    ("mla_decode", "dense"): ARCHS,
    ("mla_decode", "dense_fp8"): TESTED_ARCHS,
    ("mla_decode", "fp8_656"): TESTED_ARCHS,
    ("mla_sparse_decode", "dense"): TESTED_ARCHS,
    ("mla_sparse_decode", "fp8_656"): TESTED_ARCHS,
    ("mla_sparse_decode", "fp8_584"): TESTED_ARCHS,
    ("mla_sparse_prefill", "dense"): TESTED_ARCHS,
    ("read_pages", "dense"): ("sm_90a",),
}
_SPARSE_KERNELS = ("mla_sparse_decode", "mla_sparse_prefill")
# What the formats of bytes are made for; a dense cache takes every dtype and head dim.
_FP8_HEAD_DIMS = {"dense_fp8": (576, 512), "fp8_656": (576, 512), "fp8_584": (512, 512)}

_SHORT_DTYPE = {"bfloat16": "bf16", "float16": "fp16"}


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """The constants of one generated module; all other sizes are run-time arguments.

    Parameters
    ----------
    arch : str
        ``"sm_90a"``, ``"cpu"``, or another of ``ARCHS``.
    dtype : str
        Of the output, of queries and of a cache that is not in fp8: ``"bfloat16"`` or ``"float16"``.
    kv_format : str
        Layout of the cache; ``"dense"`` is ``(num_blocks, page_block_size, num_heads_k, head_dim_qk)`` of ``dtype``,
        the others are those of ``KV_FORMATS``.
    head_dim_qk : int
        Elements of a query or key: ``head_dim_v`` plus the rope part.
    head_dim_v : int
        Elements of a value, the leading part of the key.
    page_block_size : int
        Tokens in a page of the cache; 0 where that is an argument of each call, as for tokens that are named by index.
    block_m : int
        Rows of a query tile; 0 takes the one that the architecture's programs are written for.
    kernel : str
        ``"mla_decode"``; ``"mla_sparse_decode"`` and ``"mla_sparse_prefill"``, which attend to the tokens that indices
        name; or ``"read_pages"``, which reads the pages of a call and does nothing with them.
    """

    arch: str = "sm_90a"
    dtype: str = "bfloat16"
    kv_format: str = "dense"
    head_dim_qk: int = 576
    head_dim_v: int = 512
    page_block_size: int = 64
    block_m: int = 0
    kernel: str = "mla_decode"

    def __post_init__(self) -> None:
        if self.block_m == 0:
            object.__setattr__(self, "block_m", BLOCK_M.get(self.arch, 64))

    @property
    def name(self) -> str:
        """A readable name, unique among specs; the stem of the module's file names."""
        dtype = _SHORT_DTYPE.get(self.dtype, self.dtype)
        page = f"_p{self.page_block_size}" if self.page_block_size else ""
        return (
            f"{self.kernel}_{self.arch}_{dtype}_{self.kv_format}_d{self.head_dim_qk}_v{self.head_dim_v}"
            f"{page}_m{self.block_m}"
        )

    @property
    def programs(self) -> tuple[str, ...]:
        """Names of the programs that the module is made of."""
        if self.kernel == "mla_decode" and self.kv_format == "fp8_656" and self.arch == "sm_90a":
            return KERNELS[self.kernel] + _NARROW
        if self.kernel != "mla_sparse_decode" or self.kv_format == "dense":
            return KERNELS[self.kernel]
        return KERNELS[self.kernel] + (_PAIRED if self.arch == "sm_90a" else ()) + _APPENDING

    @property
    def exports(self) -> tuple[str, ...]:
        """Names of the functions that the module exports."""
        programs = self.programs
        return programs + tuple(f"{name}_unfolded" for name in programs if name in UNFOLDED_PROGRAMS)

    @property
    def head_dim_rope(self) -> int:
        """Elements of the rope part: ``head_dim_qk - head_dim_v``."""
        return self.head_dim_qk - self.head_dim_v

    @property
    def build_options(self) -> str:
        """Options of ``tilemla build`` that build this module alone."""
        page = f" --page-block-size {self.page_block_size}" if self.page_block_size else ""
        return (
            f"--kernel {self.kernel} --arch {self.arch} --dtype {self.dtype} --kv-format {self.kv_format} "
            f"--head-dim-qk {self.head_dim_qk}{page}"
        )

    def why_invalid(self) -> str | None:
        """The one validity predicate.

        Returns
        -------
        str or None
            None when there is a tile program for this spec, else the first reason why there is none, with the
            received value.
        """
        if self.kernel not in KERNELS:
            return f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}"
        if self.arch not in ARCHS:
            return f"arch must be one of {', '.join(ARCHS)}, got {self.arch!r}"
        if self.dtype not in DTYPES:
            return f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}"
        if self.kv_format not in KV_FORMATS:
            return f"kv_format must be one of {', '.join(KV_FORMATS)}, got {self.kv_format!r}"
        if (self.head_dim_qk, self.head_dim_v) not in HEAD_DIMS:
            known = " or ".join(map(str, HEAD_DIMS))
            return f"(head_dim_qk, head_dim_v) must be {known}, got ({self.head_dim_qk}, {self.head_dim_v})"
        archs = _WRITTEN_FOR.get((self.kernel, self.kv_format), ())
        if not archs:
            known = ", ".join(kv_format for kernel, kv_format in _WRITTEN_FOR if kernel == self.kernel)
            return f"kv_format of {self.kernel} must be one of {known}, got {self.kv_format!r}"
        if self.arch not in archs:
            known = " or ".join(archs)
            return f"{self.kernel} of a {self.kv_format} cache has no program but for {known}, got arch {self.arch!r}"
        if self.kv_format in _FP8_HEAD_DIMS:
            if self.dtype != "bfloat16":
                return f"dtype must be bfloat16 for a {self.kv_format} cache, got {self.dtype!r}"
            if (self.head_dim_qk, self.head_dim_v) != _FP8_HEAD_DIMS[self.kv_format]:
                return (
                    f"(head_dim_qk, head_dim_v) must be {_FP8_HEAD_DIMS[self.kv_format]} for a {self.kv_format} cache, "
                    f"got ({self.head_dim_qk}, {self.head_dim_v})"
                )
        sizes = page_block_sizes_of(self.kernel, self.kv_format)
        if self.page_block_size not in sizes:
            known = f"one of {', '.join(map(str, sizes))}" if len(sizes) > 1 else f"{sizes[0]} for {self.kernel}"
            return f"page_block_size must be {known}, got {self.page_block_size}"
        if self.block_m != BLOCK_M[self.arch]:
            return f"block_m must be {BLOCK_M[self.arch]} on {self.arch}, got {self.block_m}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> KernelSpec:
        """Make a spec of what ``to_dict`` gave.

        Raises
        ------
        ValueError
            On a field that is unknown or of the wrong type.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key, value in fields.items():
            if key not in known:
                raise ValueError(f"spec has no field {key!r}; its fields are {', '.join(known)}")
            expected = type(known[key].default)
            if type(value) is not expected:
                raise ValueError(f"spec field {key} must be {expected.__name__}, got {value!r}")
        return cls(**fields)


def page_block_sizes_of(kernel: str, kv_format: str) -> tuple[int, ...]:
    """Values of ``KernelSpec.page_block_size`` that a kernel is written for; 0 alone where any size is an argument."""
    if kernel in _SPARSE_KERNELS:
        return (0,)
    if kernel == "read_pages" or kv_format != "dense":
        return (64,)
    return PAGE_BLOCK_SIZES


# What serves calls: what building ahead of time builds and what generating on demand may generate, the same list.
SUPPORTED_SPECS: tuple[KernelSpec, ...] = tuple(
    spec
    for kernel, kv_format in _WRITTEN_FOR
    for arch in ARCHS
    for dtype in DTYPES
    for head_dim_qk, head_dim_v in HEAD_DIMS
    for page_block_size in page_block_sizes_of(kernel, kv_format)
    if kernel != "read_pages"
    and (
        spec := KernelSpec(arch, dtype, kv_format, head_dim_qk, head_dim_v, page_block_size, kernel=kernel)
    ).why_invalid()
    is None
)

# What the benchmark compares with, built only when it is asked for.
BENCHMARK_SPECS: tuple[KernelSpec, ...] = tuple(
    KernelSpec(arch="sm_90a", dtype=dtype, kernel="read_pages") for dtype in DTYPES
)

# The modules that serve a model, whatever its number of heads, batch and lengths: those are run-time arguments.
PRESETS: dict[str, tuple[KernelSpec, ...]] = {
    # DeepSeek-V3 and R1: 512 + 64 latent dimensions, 128 query heads (16 on each of eight GPUs), pages of 64 tokens.
    "deepseek-v3": tuple(
        spec
        for spec in SUPPORTED_SPECS
        if (spec.kernel, spec.kv_format, spec.head_dim_qk, spec.page_block_size) == ("mla_decode", "dense", 576, 64)
    ),
    # DeepSeek-V3.2, which attends to 2048 tokens of its choice: decode over caches of 656 bytes a token or of 16 bits
    # an element, and prefill.
    "deepseek-v3.2": tuple(
        spec for spec in SUPPORTED_SPECS if spec.kernel in _SPARSE_KERNELS and spec.head_dim_qk == 576
    ),
}


def select_specs(
    *,
    kernels: Collection[str] = (),
    presets: Collection[str] = (),
    archs: Collection[str] = (),
    dtypes: Collection[str] = (),
    kv_formats: Collection[str] = (),
    head_dims_qk: Collection[int] = (),
    head_dims_v: Collection[int] = (),
    page_block_sizes: Collection[int] = (),
) -> list[KernelSpec]:
    """The specs of some presets, narrowed by field.

    Parameters
    ----------
    kernels : collection of str
        Keys of ``KERNELS`` to keep; none keeps all that serve calls.
    presets : collection of str
        Keys of ``PRESETS``, whose specs are joined. None takes those of all presets, or every spec where a cache
        format, a head dim or a page size is asked for.
    archs, dtypes, kv_formats, head_dims_qk, head_dims_v, page_block_sizes : collection
        Values of a field to keep; none keeps all, and of the architectures ``TESTED_ARCHS``.

    Returns
    -------
    list of KernelSpec
        In the order of ``SUPPORTED_SPECS``, then of ``BENCHMARK_SPECS``; empty when nothing fits.

    Raises
    ------
    ValueError
        On a preset that does not exist.
    """
    for preset in presets:
        if preset not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    every = SUPPORTED_SPECS + BENCHMARK_SPECS
    of_a_geometry = kv_formats or head_dims_qk or head_dims_v or page_block_sizes
    chosen = {spec for preset in presets or PRESETS for spec in PRESETS[preset]}
    if not presets:
        chosen.update(every if of_a_geometry else BENCHMARK_SPECS)
    filters = (
        ("arch", archs or TESTED_ARCHS),
        ("dtype", dtypes),
        ("kv_format", kv_formats),
        ("head_dim_qk", head_dims_qk),
        ("head_dim_v", head_dims_v),
        ("page_block_size", page_block_sizes),
    )
    return [
        spec
        for spec in every
        if spec in chosen
        and (spec.kernel in kernels if kernels else spec.kernel != "read_pages")
        and all(not values or getattr(spec, field) in values for field, values in filters)
    ]

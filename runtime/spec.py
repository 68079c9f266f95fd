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
    "read_pages": ("read_pages",),
}
# The functions that it exports beside its programs: second ways into some of them.
_SECOND_WAYS = {"mla_decode": ("mla_decode_unfolded", "mla_decode_plain_unfolded")}
# Those that results were compared on: what is built unless others are asked for.
TESTED_ARCHS = ("sm_90a", "cpu")
ARCHS = (*TESTED_ARCHS, "sm_80", "sm_89", "sm_100", "sm_120")
DTYPES = ("bfloat16", "float16")
KV_FORMATS = ("dense",)
# (head_dim_qk, head_dim_v); the rope part of a key is the difference.
HEAD_DIMS = ((576, 512), (512, 512))
PAGE_BLOCK_SIZES = (1, 16, 32, 64, 128, 256)
# Rows of a query tile: wgmma multiplies 64 rows at a time, a CPU core keeps fewer rows in its cache, and where tensor
# cores are fed by ldmatrix alone four warps hold an accumulator of 32 rows.
BLOCK_M = {"sm_90a": 64, "cpu": 16, "sm_80": 32, "sm_89": 32, "sm_100": 32, "sm_120": 32}

_SHORT_DTYPE = {"bfloat16": "bf16", "float16": "fp16"}


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """The constants of one generated module; all other sizes are run-time arguments.

    Parameters
    ----------
    arch : str
        ``"sm_90a"``, ``"cpu"``, or another of ``ARCHS``.
    dtype : str
        Of queries, cache and output: ``"bfloat16"`` or ``"float16"``.
    kv_format : str
        Layout of the cache; ``"dense"`` is ``(num_blocks, page_block_size, num_heads_k, head_dim_qk)`` of ``dtype``.
    head_dim_qk : int
        Elements of a query or key: ``head_dim_v`` plus the rope part.
    head_dim_v : int
        Elements of a value, the leading part of the key.
    page_block_size : int
        Tokens in a page of the cache.
    block_m : int
        Rows of a query tile; 0 takes the one that the architecture's programs are written for.
    kernel : str
        ``"mla_decode"``, or ``"read_pages"``, which reads the pages of a call and does nothing with them.
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
        return (
            f"{self.kernel}_{self.arch}_{dtype}_{self.kv_format}_d{self.head_dim_qk}_v{self.head_dim_v}"
            f"_p{self.page_block_size}_m{self.block_m}"
        )

    @property
    def programs(self) -> tuple[str, ...]:
        """Names of the programs that the module is made of."""
        return KERNELS[self.kernel]

    @property
    def exports(self) -> tuple[str, ...]:
        """Names of the functions that the module exports."""
        return self.programs + _SECOND_WAYS.get(self.kernel, ())

    @property
    def head_dim_rope(self) -> int:
        """Elements of the rope part: ``head_dim_qk - head_dim_v``."""
        return self.head_dim_qk - self.head_dim_v

    @property
    def build_options(self) -> str:
        """Options of ``tilemla build`` that build this module alone."""
        kernel = "" if self.kernel == KernelSpec.kernel else f"--kernel {self.kernel} "
        return (
            f"{kernel}--arch {self.arch} --dtype {self.dtype} --head-dim-qk {self.head_dim_qk} "
            f"--page-block-size {self.page_block_size}"
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
        if self.page_block_size not in PAGE_BLOCK_SIZES:
            known = ", ".join(map(str, PAGE_BLOCK_SIZES))
            return f"page_block_size must be one of {known}, got {self.page_block_size}"
        if self.block_m != BLOCK_M[self.arch]:
            return f"block_m must be {BLOCK_M[self.arch]} on {self.arch}, got {self.block_m}"
        if self.kernel == "read_pages" and (self.arch, self.page_block_size) != ("sm_90a", 64):
            return f"read_pages must be for sm_90a and pages of 64, got {self.arch} and {self.page_block_size}"
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


# What serves calls: what building ahead of time builds and what generating on demand may generate, the same list.
SUPPORTED_SPECS: tuple[KernelSpec, ...] = tuple(
    spec
    for arch in ARCHS
    for dtype in DTYPES
    for head_dim_qk, head_dim_v in HEAD_DIMS
    for page_block_size in PAGE_BLOCK_SIZES
    if (spec := KernelSpec(arch, dtype, "dense", head_dim_qk, head_dim_v, page_block_size)).why_invalid() is None
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
        if (spec.kv_format, spec.head_dim_qk, spec.head_dim_v, spec.page_block_size) == ("dense", 576, 512, 64)
    ),
}


def select_specs(
    *,
    kernels: Collection[str] = ("mla_decode",),
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
        Keys of ``KERNELS``.
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
        and spec.kernel in kernels
        and all(not values or getattr(spec, field) in values for field, values in filters)
    ]

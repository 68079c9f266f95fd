"""Which kernel spec serves a call: a pure function of what the tensors are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tilemla.spec import SUPPORTED_SPECS, KernelSpec

# Machine code runs on its compute capability and on later minor ones of the same major one. 8.6 is missing: code for
# 8.0 runs there, but its tile wants more shared memory than there is, and code for 8.9 does not run there. So is 8.7,
# another kind of machine.
_ARCHS = {
    (9, 0): "sm_90a",
    (8, 0): "sm_80",
    (8, 9): "sm_89",
    (10, 0): "sm_100",
    (10, 3): "sm_100",
    (12, 0): "sm_120",
    (12, 1): "sm_120",
}


def arch_of(device_type: str, capability: tuple[int, int] | None) -> str | None:
    """The architecture name of a device, or None when no kernel is written for it.

    Parameters
    ----------
    device_type : str
        ``"cpu"``, ``"cuda"``, …, as in ``torch.device.type``.
    capability : (int, int) or None
        CUDA compute capability; None on other devices.
    """
    if device_type == "cpu":
        return "cpu"
    if device_type == "cuda" and capability is not None:
        return _ARCHS.get(capability)
    return None


# What the kernels are for, and what they read, in words.
_WORDS = {
    "mla_decode": "dense decode",
    "mla_sparse_decode": "sparse decode",
    "mla_sparse_prefill": "sparse prefill",
    "dense": "a bfloat16 or float16 cache",
    "dense_fp8": "an e4m3 cache",
    "fp8_656": "an fp8 cache of 656 bytes a token",
    "fp8_584": "an fp8 cache of 584 bytes a token",
}
# The arguments that a spec's fields say something about, in the order in which a call is refused.
_ARGUMENTS = {
    "dtype": "q must be {}",
    "head_dim_qk": "q must have head dim {}",
    "head_dim_v": "head_dim_v must be {}",
    "page_block_size": "k_cache must have page_block_size {}",
}


def why_rejected(specs: Sequence[KernelSpec], call: Mapping[str, Any]) -> str:
    """Why none of some specs serves a call, by the first argument that leaves none, naming what it may be.

    Parameters
    ----------
    specs : sequence of KernelSpec
        Those of one architecture.
    call : mapping
        The fields of a spec that would serve the call.
    """
    for field, words in _ARGUMENTS.items():
        left = [spec for spec in specs if getattr(spec, field) == call[field]]
        if not left:
            known = [str(value) for value in dict.fromkeys(getattr(spec, field) for spec in specs)]
            choice = " or ".join(filter(None, (", ".join(known[:-1]), known[-1])))
            return f"{words.format(choice)}, got {call[field]}"
        specs = left
    raise ValueError(f"{specs[0].name} serves the call")


def select_spec(
    *,
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: str,
    head_dim_qk: int,
    head_dim_v: int,
    page_block_size: int,
    kernel: str = "mla_decode",
    kv_format: str = "dense",
) -> KernelSpec:
    """Choose the kernel spec for a call.

    Parameters
    ----------
    device_type : str
        As in ``torch.device.type``.
    capability : (int, int) or None
        CUDA compute capability; None on other devices.
    dtype : str
        Of queries and cache, such as ``"bfloat16"``.
    head_dim_qk, head_dim_v, page_block_size : int
        Elements of a query, elements of a value, tokens in a page; 0 where kernels take any number of them.
    kernel, kv_format : str
        What is called, and the layout of the cache, in a spec's words.

    Returns
    -------
    KernelSpec
        The first supported spec that serves the call.

    Raises
    ------
    NotImplementedError
        When none does, naming the argument, what it may be and what it got.
    """
    arch = arch_of(device_type, capability)
    if arch is None:
        device = f"a {device_type} device"
        if capability is not None:
            device += f" of compute capability {capability[0]}.{capability[1]}"
        known = ", ".join(f"{major}.{minor} ({arch})" for (major, minor), arch in _ARCHS.items())
        raise NotImplementedError(f"q must be on a CPU or on a GPU of compute capability {known}, got {device}")
    call = dict(dtype=dtype, head_dim_qk=head_dim_qk, head_dim_v=head_dim_v, page_block_size=page_block_size)
    specs = [spec for spec in SUPPORTED_SPECS if (spec.kernel, spec.kv_format) == (kernel, kv_format)]
    archs = dict.fromkeys(spec.arch for spec in specs)
    if arch not in archs:
        raise NotImplementedError(
            f"there is no kernel for {_WORDS[kernel]} of {_WORDS[kv_format]} on {arch}; there is for {', '.join(archs)}"
        )
    specs = [spec for spec in specs if spec.arch == arch]
    for spec in specs:
        if all(getattr(spec, field) == value for field, value in call.items()):
            return spec
    raise NotImplementedError(f"there is no kernel for these arguments: {why_rejected(specs, call)}")

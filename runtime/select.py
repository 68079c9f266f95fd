"""Which kernel spec serves a call: a pure function of what the tensors are."""

from __future__ import annotations

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


def why_rejected(
    spec: KernelSpec, *, arch: str, dtype: str, head_dim_qk: int, head_dim_v: int, page_block_size: int
) -> str | None:
    """Why ``spec`` does not serve a call, naming the argument, or None when it does."""
    if spec.arch != arch:
        return f"it is for {spec.arch}, the tensors are on {arch}"
    if spec.dtype != dtype:
        return f"q must be {spec.dtype}, got {dtype}"
    if spec.head_dim_qk != head_dim_qk:
        return f"q must have head dim {spec.head_dim_qk}, got {head_dim_qk}"
    if spec.head_dim_v != head_dim_v:
        return f"head_dim_v must be {spec.head_dim_v}, got {head_dim_v}"
    if spec.page_block_size != page_block_size:
        return f"k_cache must have page_block_size {spec.page_block_size}, got {page_block_size}"
    return None


def select_spec(
    *,
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: str,
    head_dim_qk: int,
    head_dim_v: int,
    page_block_size: int,
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
        Elements of a query, elements of a value, tokens in a page.

    Returns
    -------
    KernelSpec
        The first supported spec that serves the call.

    Raises
    ------
    NotImplementedError
        When none does, with the reason for each spec of the device's architecture.
    """
    arch = arch_of(device_type, capability)
    if arch is None:
        device = f"a {device_type} device"
        if capability is not None:
            device += f" of compute capability {capability[0]}.{capability[1]}"
        known = ", ".join(f"{major}.{minor} ({arch})" for (major, minor), arch in _ARCHS.items())
        raise NotImplementedError(f"q must be on a CPU or on a GPU of compute capability {known}, got {device}")
    rejections = []
    for spec in SUPPORTED_SPECS:
        reason = why_rejected(
            spec,
            arch=arch,
            dtype=dtype,
            head_dim_qk=head_dim_qk,
            head_dim_v=head_dim_v,
            page_block_size=page_block_size,
        )
        if reason is None:
            return spec
        if spec.arch == arch:
            rejections.append(f"{spec.name}: {reason}")
    raise NotImplementedError("there is no kernel for these arguments; " + "; ".join(rejections))

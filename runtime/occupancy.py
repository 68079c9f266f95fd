"""How many CTAs of a kernel fit on a streaming multiprocessor at once, and what keeps more from fitting."""

from __future__ import annotations

import dataclasses

from tilemla.manifest import KernelReport

_WARP_THREADS = 32


@dataclasses.dataclass(frozen=True)
class SmLimits:
    """What one streaming multiprocessor (SM) has to share among CTAs.

    Parameters
    ----------
    registers : int
        32-bit registers.
    registers_per_unit : int
        A warp gets its registers in units of so many.
    partitions : int
        Schedulers, each with its part of the registers; a warp stays on one.
    max_warps, max_ctas : int
        Warps and CTAs that can be resident.
    smem_bytes : int
        Shared memory, of the largest carve-out.
    smem_reserved_bytes : int
        Shared memory that the system takes for itself with each CTA.
    smem_bytes_per_unit : int
        A CTA gets its shared memory in units of so many bytes.
    """

    registers: int
    registers_per_unit: int
    partitions: int
    max_warps: int
    max_ctas: int
    smem_bytes: int
    smem_reserved_bytes: int
    smem_bytes_per_unit: int


# "Technical Specifications per Compute Capability", CUDA C++ Programming Guide; units and partitions as in
# cuda_occupancy.h of the CUDA toolkit.
_SM_90 = SmLimits(
    registers=65536,
    registers_per_unit=256,
    partitions=4,
    max_warps=64,
    max_ctas=32,
    smem_bytes=228 * 1024,
    smem_reserved_bytes=1024,
    smem_bytes_per_unit=128,
)
_SM_89 = dataclasses.replace(_SM_90, max_warps=48, max_ctas=24, smem_bytes=100 * 1024)
SM_LIMITS = {
    "sm_90a": _SM_90,
    "sm_80": dataclasses.replace(_SM_90, smem_bytes=164 * 1024),
    "sm_89": _SM_89,
    "sm_100": _SM_90,
    "sm_120": _SM_89,
}


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """What is resident on one SM when a kernel fills the GPU.

    Parameters
    ----------
    ctas_per_sm, warps_per_sm : int
        CTAs and warps at once; 0 when not even one CTA fits.
    max_warps_per_sm : int
        Warps that the SM could hold.
    limited_by : tuple of str
        What runs out first: ``"registers"``, ``"shared memory"``, ``"warps"``, ``"CTAs"``; several when they tie.
    """

    ctas_per_sm: int
    warps_per_sm: int
    max_warps_per_sm: int
    limited_by: tuple[str, ...]


def occupancy_of(kernel: KernelReport, arch: str) -> Occupancy:
    """Compute the occupancy of a kernel from what the compiler reported.

    The registers that count are those of the launch: what warpgroups hand each other with ``setmaxnreg`` stays inside
    the CTA.

    Parameters
    ----------
    kernel : KernelReport
        Registers, shared memory and threads of the kernel.
    arch : str
        A key of ``SM_LIMITS``.

    Raises
    ------
    ValueError
        On an architecture whose limits are not known, or a kernel without threads.
    """
    if arch not in SM_LIMITS:
        raise ValueError(f"arch must be one of {', '.join(SM_LIMITS)}, got {arch!r}")
    if kernel.threads < 1:
        raise ValueError(f"{kernel.name}: threads must be 1 or more, got {kernel.threads}")
    limits = SM_LIMITS[arch]
    warps = -(-kernel.threads // _WARP_THREADS)
    registers = _round_up(max(kernel.registers, 1) * _WARP_THREADS, limits.registers_per_unit)
    warps_of_registers = limits.registers // limits.partitions // registers * limits.partitions
    smem_bytes = _round_up(kernel.smem_bytes + limits.smem_reserved_bytes, limits.smem_bytes_per_unit)
    fitting = {
        "registers": warps_of_registers // warps,
        "shared memory": limits.smem_bytes // smem_bytes,
        "warps": limits.max_warps // warps,
        "CTAs": limits.max_ctas,
    }
    ctas = min(fitting.values())
    limited_by = tuple(resource for resource, count in fitting.items() if count == ctas)
    return Occupancy(ctas, ctas * warps, limits.max_warps, limited_by)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

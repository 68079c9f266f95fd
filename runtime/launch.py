"""The functions that serve a call: chosen once per device, dtype and geometry, then found in a dictionary."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tilemla.loader import LoadedModule, find_module, load_module, loaded_specs
from tilemla.log import logger
from tilemla.select import arch_of, select_spec
from tilemla.spec import SUPPORTED_SPECS, TESTED_ARCHS, KernelSpec

# What a CPU counts as: enough parts that a batch exercises splitting.
CPU_NUM_SMS = 8


class Kernels(NamedTuple):
    """What runs on one device. The plain decode functions lack ``attn_sink``, ``window_left`` and ``has_sink``.

    Those for few rows are None where the module has none.
    """

    spec: KernelSpec
    num_sms: int
    mla_decode: Callable[..., None]
    mla_decode_unfolded: Callable[..., None]
    mla_decode_plain: Callable[..., None]
    mla_decode_plain_unfolded: Callable[..., None]
    get_mla_metadata: Callable[..., None]
    mla_decode_narrow: Callable[..., None] | None = None
    mla_decode_narrow_unfolded: Callable[..., None] | None = None

    @classmethod
    def of(cls, spec: KernelSpec, module: LoadedModule, device: torch.device) -> Kernels:
        """Those of an open module."""
        optional = cls._field_defaults
        names = [name for name in cls._fields[2:] if name not in optional or name in module.functions]
        return cls(spec, num_sms_of(device), **{name: module.functions[name] for name in names})


_kernels: dict[tuple[torch.device, torch.dtype, int, int, int, str], Kernels] = {}
_modules: dict[tuple[torch.device, str, torch.dtype | None], LoadedModule] = {}
_of_kind: dict[tuple[torch.device, str, str, torch.dtype, int, int], LoadedModule] = {}
_num_sms: dict[torch.device, int] = {}


def num_sms_of(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 8 for the CPU."""
    count = _num_sms.get(device)
    if count is None:
        count = CPU_NUM_SMS
        if device.type == "cuda":
            count = torch.cuda.get_device_properties(device).multi_processor_count
        _num_sms[device] = count
    return count


def gpu_name_of(device: torch.device) -> str:
    """The name of a CUDA device; ``"cpu"`` for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def arch_of_device(device: torch.device) -> str | None:
    """The architecture of a device's kernels; None where there are none."""
    return arch_of(device.type, _capability(device))


def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _refuse_capture(device: torch.device, what: str) -> None:
    """Opening a module allocates and loads code, which a CUDA graph cannot record."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"{what} was called for the first time inside a CUDA graph capture; call it once before")


def kernels_for(
    device: torch.device,
    dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_v: int,
    page_block_size: int,
    kv_format: str = "dense",
) -> Kernels:
    """Select, load and remember the kernels for a kind of call through a block table.

    Raises
    ------
    NotImplementedError
        When no kernel serves it, or its module is not built and cannot be.
    """
    key = (device, dtype, head_dim_qk, head_dim_v, page_block_size, kv_format)
    kernels = _kernels.get(key)
    if kernels is None:
        spec = select_spec(
            device_type=device.type,
            capability=_capability(device),
            dtype=str(dtype).removeprefix("torch."),
            head_dim_qk=head_dim_qk,
            head_dim_v=head_dim_v,
            page_block_size=page_block_size,
            kv_format=kv_format,
        )
        _refuse_capture(device, "flash_mla_with_kvcache")
        if spec.arch not in TESTED_ARCHS:
            logger().warning("%s is untested on hardware: compare its results before you rely on them", spec.name)
        module = load_module(spec)
        kernels = Kernels.of(spec, module, device)
        _kernels[key] = kernels
    return kernels


def module_of_kind(
    device: torch.device,
    caller: str,
    *,
    kernel: str,
    kv_format: str,
    dtype: torch.dtype,
    head_dim_qk: int,
    head_dim_v: int,
) -> LoadedModule:
    """Select, load and remember the module for a kind of call whose tokens are named by index.

    Raises
    ------
    NotImplementedError
        When no kernel serves it, or its module is not built and cannot be.
    """
    key = (device, kernel, kv_format, dtype, head_dim_qk, head_dim_v)
    module = _of_kind.get(key)
    if module is None:
        spec = select_spec(
            device_type=device.type,
            capability=_capability(device),
            dtype=str(dtype).removeprefix("torch."),
            head_dim_qk=head_dim_qk,
            head_dim_v=head_dim_v,
            page_block_size=0,
            kernel=kernel,
            kv_format=kv_format,
        )
        _refuse_capture(device, caller)
        module = _of_kind[key] = load_module(spec)
    return module


def module_for(
    device: torch.device, caller: str, dtype: torch.dtype | None = None, program: str | None = None
) -> LoadedModule:
    """Load a module for programs that do not depend on the cache's geometry: many modules of a device have them.

    Parameters
    ----------
    device : torch.device
        Where the tensors are.
    caller : str
        The public function, for messages.
    dtype : torch.dtype, optional
        Where it matters, that of queries and outputs.
    program : str, optional
        What is wanted; by default it is called as the public function is.

    Raises
    ------
    NotImplementedError
        When no kernel runs on the device or takes the dtype, or no module is built and none can be.
    """
    program = program or caller
    key = (device, program, dtype)
    module = _modules.get(key)
    if module is None:
        default = select_spec(
            device_type=device.type,
            capability=_capability(device),
            dtype=KernelSpec.dtype if dtype is None else str(dtype).removeprefix("torch."),
            head_dim_qk=KernelSpec.head_dim_qk,
            head_dim_v=KernelSpec.head_dim_v,
            page_block_size=KernelSpec.page_block_size,
        )
        _refuse_capture(device, caller)
        candidates = [default]
        for spec in SUPPORTED_SPECS:
            fits = spec.arch == default.arch and program in spec.exports
            if fits and (dtype is None or spec.dtype == default.dtype):
                candidates.append(spec)
        # Prefer what is open, then what is built, before generating one for this alone.
        is_open = loaded_specs()
        chosen = next((spec for spec in candidates if spec in is_open), None)
        if chosen is None:
            chosen = next((spec for spec in candidates if find_module(spec) is not None), default)
        module = _modules[key] = load_module(chosen)
    return module

"""Multi-head Latent Attention decode through kernels generated from tile programs, behind FlashMLA's API.

Importing this package does no work and imports neither torch nor TVM-FFI; they come with the first use of a name. Only
where ``TILEMLA_PRELOAD`` names a preset are its modules loaded at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilemla.alias import alias_flash_mla
    from tilemla.append import append_k_cache
    from tilemla.errors import ModuleBuildError, ModuleNotBuiltError
    from tilemla.fp8 import flash_mla_with_kvcache_fp8, get_mla_metadata_dense_fp8
    from tilemla.interface import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
    from tilemla.loader import ensure_module
    from tilemla.merge import merge_states
    from tilemla.prefill import flash_mla_sparse_fwd
    from tilemla.preloading import preload_modules
    from tilemla.quantize import dequantize_k_cache, quantize_k_cache
    from tilemla.spec import PRESETS, SUPPORTED_SPECS, KernelSpec, select_specs
    from tilemla.workspace import release_workspaces

__version__ = "0.1.0"

_HOME = {
    "FlashMLASchedMeta": "tilemla.interface",
    "KernelSpec": "tilemla.spec",
    "ModuleBuildError": "tilemla.errors",
    "ModuleNotBuiltError": "tilemla.errors",
    "PRESETS": "tilemla.spec",
    "SUPPORTED_SPECS": "tilemla.spec",
    "alias_flash_mla": "tilemla.alias",
    "append_k_cache": "tilemla.append",
    "dequantize_k_cache": "tilemla.quantize",
    "ensure_module": "tilemla.loader",
    "flash_mla_sparse_fwd": "tilemla.prefill",
    "flash_mla_with_kvcache": "tilemla.interface",
    "flash_mla_with_kvcache_fp8": "tilemla.fp8",
    "get_mla_metadata": "tilemla.interface",
    "get_mla_metadata_dense_fp8": "tilemla.fp8",
    "merge_states": "tilemla.merge",
    "preload_modules": "tilemla.preloading",
    "quantize_k_cache": "tilemla.quantize",
    "release_workspaces": "tilemla.workspace",
    "select_specs": "tilemla.spec",
}

__all__ = [
    "PRESETS",
    "SUPPORTED_SPECS",
    "FlashMLASchedMeta",
    "KernelSpec",
    "ModuleBuildError",
    "ModuleNotBuiltError",
    "alias_flash_mla",
    "append_k_cache",
    "dequantize_k_cache",
    "ensure_module",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "flash_mla_with_kvcache_fp8",
    "get_mla_metadata",
    "get_mla_metadata_dense_fp8",
    "merge_states",
    "preload_modules",
    "quantize_k_cache",
    "release_workspaces",
    "select_specs",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _preload_if_asked() -> None:
    from tilemla import env

    if env.preload_preset() is not None:
        importlib.import_module("tilemla.preload")


_preload_if_asked()

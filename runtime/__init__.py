"""Multi-head Latent Attention decode through kernels generated from tile programs, behind FlashMLA's API.

Importing this package does no work and imports neither torch nor TVM-FFI; they come with the first use of a name.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilemla.errors import ModuleBuildError, ModuleNotBuiltError
    from tilemla.interface import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata
    from tilemla.loader import ensure_module
    from tilemla.spec import SUPPORTED_SPECS, KernelSpec, iter_specs

__version__ = "0.1.0"

_HOME = {
    "FlashMLASchedMeta": "tilemla.interface",
    "KernelSpec": "tilemla.spec",
    "ModuleBuildError": "tilemla.errors",
    "ModuleNotBuiltError": "tilemla.errors",
    "SUPPORTED_SPECS": "tilemla.spec",
    "ensure_module": "tilemla.loader",
    "flash_mla_with_kvcache": "tilemla.interface",
    "get_mla_metadata": "tilemla.interface",
    "iter_specs": "tilemla.spec",
}

__all__ = [
    "SUPPORTED_SPECS",
    "FlashMLASchedMeta",
    "KernelSpec",
    "ModuleBuildError",
    "ModuleNotBuiltError",
    "ensure_module",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "iter_specs",
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

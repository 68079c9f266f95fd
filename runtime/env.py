"""Every environment variable that tilemla reads, in one place. Read when asked for, never at import."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


def _flag(name: str) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise ValueError(f"{name} must be 1 or 0, got {value!r}")


def module_path() -> tuple[Path, ...]:
    """``TILEMLA_MODULE_PATH``: directories of modules that were built ahead of time, separated as in ``PATH``."""
    entries = os.environ.get("TILEMLA_MODULE_PATH", "").split(os.pathsep)
    return tuple(Path(entry).expanduser().absolute() for entry in entries if entry)


def cache_dir() -> Path:
    """``TILEMLA_CACHE_DIR``: where modules generated on demand are kept; by default the user's cache directory."""
    value = os.environ.get("TILEMLA_CACHE_DIR")
    return Path(value).expanduser().absolute() if value else Path(platformdirs.user_cache_path("tilemla"))


def build_disabled() -> bool:
    """``TILEMLA_DISABLE_BUILD=1``: never generate a module on demand, raise ``ModuleNotBuiltError`` instead."""
    return _flag("TILEMLA_DISABLE_BUILD")


def cuda_homes() -> tuple[Path, ...]:
    """``CUDA_HOME``, then ``CUDA_PATH``: roots of CUDA toolkits, asked for nvcc before ``PATH`` is."""
    return tuple(Path(value) for name in ("CUDA_HOME", "CUDA_PATH") if (value := os.environ.get(name)))


def cxx() -> str | None:
    """``CXX``: the C++ compiler that builds CPU modules and launchers."""
    return os.environ.get("CXX") or None

"""Every environment variable that tilemla reads, in one place. Read when asked for, never at import."""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

# What `tilemla` reads beside compilers' own variables; `tilemla doctor` shows those that are set.
NAMES = (
    "TILEMLA_MODULE_PATH",
    "TILEMLA_CACHE_DIR",
    "TILEMLA_BUILD",
    "TILEMLA_PRELOAD",
    "TILEMLA_LOG",
    "TILEMLA_TUNING_DIR",
)
_LOG_LEVELS = ("debug", "info", "warning", "error")


def _choice(name: str, choices: tuple[str, ...], default: str) -> str:
    value = os.environ.get(name, "").strip().lower() or default
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {os.environ[name]!r}")
    return value


def module_path() -> tuple[Path, ...]:
    """``TILEMLA_MODULE_PATH``: directories of modules that were built ahead of time, separated as in ``PATH``."""
    entries = os.environ.get("TILEMLA_MODULE_PATH", "").split(os.pathsep)
    return tuple(Path(entry).expanduser().absolute() for entry in entries if entry)


def cache_dir() -> Path:
    """``TILEMLA_CACHE_DIR``: where modules generated on demand are kept; by default the user's cache directory."""
    value = os.environ.get("TILEMLA_CACHE_DIR")
    if value:
        return Path(value).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_path("tilemla"))


def tuning_dir() -> Path | None:
    """``TILEMLA_TUNING_DIR``: where the tables lie that ``tilemla tune`` wrote; unset takes those of the package."""
    value = os.environ.get("TILEMLA_TUNING_DIR")
    return Path(value).expanduser().absolute() if value else None


def build_allowed() -> bool:
    """``TILEMLA_BUILD``: ``auto`` generates a missing module on demand, ``never`` raises ``ModuleNotBuiltError``."""
    return _choice("TILEMLA_BUILD", ("auto", "never"), "auto") == "auto"


def log_level() -> str | None:
    """``TILEMLA_LOG``: ``debug``, ``info``, ``warning`` or ``error``; unset leaves logging to the application."""
    return _choice("TILEMLA_LOG", _LOG_LEVELS, "warning").upper() if os.environ.get("TILEMLA_LOG") else None


def preload_preset() -> str | None:
    """``TILEMLA_PRELOAD``: the preset whose modules are loaded when tilemla is imported.

    Nothing in tilemla's own commands: ``tilemla doctor`` has to tell what is wrong where preloading fails.
    """
    value = os.environ.get("TILEMLA_PRELOAD", "").strip()
    return None if _is_own_command() else value or None


def _is_own_command() -> bool:
    words = sys.orig_argv
    as_module = any(
        flag == "-m" and name.partition(".")[0] == "tilemla" and name != "tilemla.demo"
        for flag, name in itertools.pairwise(words)
    )
    return as_module or Path(sys.argv[0] if sys.argv else "").name == "tilemla"


def in_force() -> dict[str, str]:
    """Those of ``NAMES`` that are set, with their values."""
    return {name: os.environ[name] for name in NAMES if name in os.environ}


def for_child() -> dict[str, str]:
    """The environment for a child process that generates: this one, but it must not preload what it is to make."""
    return {name: value for name, value in os.environ.items() if name != "TILEMLA_PRELOAD"}


def cuda_homes() -> tuple[Path, ...]:
    """``CUDA_HOME``, then ``CUDA_PATH``: roots of CUDA toolkits, asked for nvcc before ``PATH`` is."""
    return tuple(Path(value) for name in ("CUDA_HOME", "CUDA_PATH") if (value := os.environ.get(name)))


def cxx() -> str | None:
    """``CXX``: the C++ compiler that builds CPU modules and launchers."""
    return os.environ.get("CXX") or None

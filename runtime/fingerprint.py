"""What a generated module depends on: the sources that generate it and the tools that compile it."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

from tilemla import __version__, toolchain
from tilemla.errors import ToolchainError
from tilemla.manifest import MANIFEST_FORMAT
from tilemla.spec import SUPPORTED_SPECS
from tilemla.tuning.chosen import select_config

_SOURCE_SUFFIXES = {".py", ".h", ".json"}
_GENERATING_PACKAGES = ("tilemla.dsl", "tilemla.codegen")
_GENERATING_DISTRIBUTIONS = ("tilelang", "apache-tvm-ffi")


def _package_folder(name: str) -> Path | None:
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        return None
    return Path(next(iter(found.submodule_search_locations)))


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


@functools.cache
def source_fingerprint() -> str:
    """Hash of the texts that decide what a spec is compiled to and how the result is called.

    Covers the sources of ``tilemla.dsl`` and ``tilemla.codegen``, compiler flags among them, the definitions of spec,
    configuration and byte layouts, the configurations that were chosen, and the manifest's format.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(f"format {MANIFEST_FORMAT}\n".encode())
    for spec in SUPPORTED_SPECS:
        digest.update(f"{spec.name} {select_config(spec).to_dict()}\n".encode())
    sources = [(name, Path(__file__).with_name(f"{name}.py")) for name in ("spec", "config", "kv_formats")]
    for package in _GENERATING_PACKAGES:
        folder = _package_folder(package)
        if folder is not None:
            files = sorted(path for path in folder.rglob("*") if path.suffix in _SOURCE_SUFFIXES)
            sources += [(f"{package}/{path.relative_to(folder).as_posix()}", path) for path in files]
    for label, path in sources:
        text = path.read_bytes()
        digest.update(f"{label} {len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()[:16]


@functools.cache
def tool_versions(arch: str) -> dict[str, str]:
    """Versions of what generates modules of an architecture here.

    Parameters
    ----------
    arch : str
        One of ``tilemla.spec.ARCHS``.

    Returns
    -------
    dict of str to str
        Version by tool: ``tilelang``, ``apache-tvm-ffi``, the C++ compiler by its file name and, for a GPU, ``nvcc``.

    Raises
    ------
    ToolchainError
        When TileLang or a compiler is missing: nothing can be generated here.
    """
    tools = {name: _version(name) for name in _GENERATING_DISTRIBUTIONS}
    missing = [name for name, version in tools.items() if version == "absent"]
    if missing:
        raise ToolchainError(f"not installed: {', '.join(missing)}; pip install 'tilemla[codegen]'")
    cxx = toolchain.find_cxx()
    tools[cxx.name] = _number_in(toolchain.tool_version(cxx))
    if arch != "cpu":
        nvcc = toolchain.find_cuda_toolkit().nvcc
        tools["nvcc"] = _number_in(toolchain.tool_version(nvcc))
    return tools


def _number_in(line: str) -> str:
    """The last dotted number of a compiler's version line; the line itself without one."""
    numbers = re.findall(r"\d+(?:\.\d+)+", line)
    return numbers[-1] if numbers else line


def why_not_generated(arch: str) -> str | None:
    """Why no module of an architecture can be generated here, with what to do; None when it can."""
    try:
        tool_versions(arch)
    except ToolchainError as error:
        return str(error)
    return None


def store_name(arch: str) -> str:
    """Name of the cache's folder for what these sources and tools make; everything that decides it can be read there.

    Raises
    ------
    ToolchainError
        When nothing can be generated here.
    """
    tools = "-".join(f"{name}{version}" for name, version in tool_versions(arch).items())
    return re.sub(r"[^\w.+-]", "_", f"{__version__}-{arch}-{tools}-{source_fingerprint()}")


def store_pattern(arch: str) -> str:
    """Glob pattern of the cache's folders that these sources made, with whatever tools."""
    return f"{__version__}-{arch}-*-{source_fingerprint()}"

"""A key for everything that generated code depends on, computed without importing TileLang."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

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
def source_key() -> str:
    """Hash of the texts and versions that decide what a spec is compiled to.

    Covers the sources of ``tilemla.dsl`` and ``tilemla.codegen``, the spec's definition, and the versions of
    TileLang and TVM-FFI. Modules with another key are stale.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for distribution in _GENERATING_DISTRIBUTIONS:
        digest.update(f"{distribution}={_version(distribution)}\n".encode())
    sources = [("spec", Path(__file__).with_name("spec.py"))]
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

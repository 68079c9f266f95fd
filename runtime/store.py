"""Where modules lie on disk: stores of entries, the order in which they are searched, and who may write there.

A store is a directory. An entry of it is a folder with a module: ``<store>/<name>/<name>.so``, ``<name>.json`` and what
the manifest names. Names that begin with a dot are work in progress: ``.<name>.lock``, ``.<name>.building-…`` and, for
an entry that was damaged, ``.<name>.damaged-…``. The cache holds one store for each version of the sources and tools.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from tilemla import env, wheel
from tilemla.errors import ModuleNotBuiltError, ToolchainError
from tilemla.fingerprint import store_name, store_pattern, why_not_generated
from tilemla.manifest import Manifest, ManifestError, manifest_path, read_manifest, verify_library
from tilemla.spec import ARCHS, KERNELS, KernelSpec


class Entry(NamedTuple):
    """A module on disk whose library has been checked against its manifest."""

    manifest: Manifest
    directory: Path

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.directory / self.manifest.library


class Location(NamedTuple):
    """A store, and how it came to be searched."""

    kind: Literal["directory", "wheel", "cache"]
    store: Path
    label: str


def entry_dir(store: str | Path, name: str) -> Path:
    """The folder of the module called ``name`` in a store."""
    return Path(store) / name


def lock_path(store: str | Path, name: str) -> Path:
    """The lock that is held while the module called ``name`` is made or removed."""
    return Path(store) / f".{name}.lock"


def building_prefix(name: str) -> str:
    """How the names of folders begin in which the module called ``name`` is being made."""
    return f".{name}.building-"


def damaged_prefix(name: str) -> str:
    """How the names of folders begin to which damaged entries were set aside."""
    return f".{name}.damaged-"


def read_entry(spec: KernelSpec, store: str | Path) -> Entry | None:
    """The module of a spec in a store.

    Parameters
    ----------
    spec : KernelSpec
        What the module must be specialised on.
    store : str or Path
        The store; it need not exist.

    Returns
    -------
    Entry or None
        None when the store has no entry of that name.

    Raises
    ------
    ManifestError
        When there is one but it is not what it says: another hash, another spec, a program missing, no manifest.
    """
    directory = entry_dir(store, spec.name)
    if not directory.is_dir():
        return None
    entry = _check_entry(directory)
    require_spec(entry, spec)
    return entry


def require_spec(entry: Entry, spec: KernelSpec) -> None:
    """Make sure that a module, whose hash has been checked, is what a call for a spec needs.

    Raises
    ------
    ManifestError
        When it is for another spec or lacks a program.
    """
    manifest = entry.manifest
    if manifest.spec != spec.to_dict():
        raise ManifestError(f"{entry.directory}: expected a module for {spec.to_dict()}, got one for {manifest.spec}")
    missing = [name for name in spec.programs if name not in manifest.programs]
    if missing:
        raise ManifestError(f"{entry.directory}: the module lacks {', '.join(missing)}")


def _check_entry(directory: Path) -> Entry:
    manifest = read_manifest(manifest_path(directory, directory.name))
    verify_library(manifest, directory)
    return Entry(manifest, directory)


def iter_entries(store: str | Path) -> Iterator[tuple[Path, Entry | ManifestError]]:
    """The entries of a store in order of their names, each with what was found when its hash was checked."""
    store = Path(store)
    for directory in sorted(store.iterdir()) if store.is_dir() else ():
        if directory.name.startswith(tuple(f"{kernel}_" for kernel in KERNELS)) and directory.is_dir():
            try:
                yield directory, _check_entry(directory)
            except ManifestError as error:
                yield directory, error


def cache_store(arch: str) -> Path:
    """The cache's store for what the sources and tools of this machine make.

    Raises
    ------
    ToolchainError
        When nothing can be generated here, so that there is no such store.
    """
    return env.cache_dir() / store_name(arch)


def iter_cache_stores() -> Iterator[Path]:
    """Every store in the cache, also those of other versions, in order of their names."""
    cache = env.cache_dir()
    for path in sorted(cache.iterdir()) if cache.is_dir() else ():
        # <version>-<arch>-<tools>-<16 hexadecimal digits>
        if path.is_dir() and not path.is_symlink() and any(f"-{arch}-" in path.name for arch in ARCHS):
            yield path


def search_path(arch: str) -> Iterator[Location]:
    """Where modules of an architecture are looked for, first to last.

    Explicit directories, installed module wheels, then the cache: what the tools of this machine made; where none can
    be made here, also what the same sources made with other tools, the newest first. Each is looked for when it is
    reached: compilers are not asked for their versions where a module was found before the cache.
    """
    for path in env.module_path():
        yield Location("directory", path, "TILEMLA_MODULE_PATH")
    for label, store in wheel.installed_module_stores():
        yield Location("wheel", store, label)
    stores: list[Path] = []
    try:
        stores.append(cache_store(arch))
    except ToolchainError:
        pass  # whoever needs one generated is told; what was made before serves all the same
    if not stores or not env.build_allowed():
        cache = env.cache_dir()
        others = [path for path in cache.glob(store_pattern(arch)) if path.is_dir() and path not in stores]
        stores += sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)
    for store in stores:
        yield Location("cache", store, "cache")


def why_cannot_generate(arch: str) -> str | None:
    """Why a missing module of an architecture is not made here, with what to do; None when it is."""
    if not env.build_allowed():
        return "TILEMLA_BUILD is never"
    return why_not_generated(arch)


def set_aside(directory: Path) -> Path:
    """Rename a damaged entry out of the way, and return its new place; whoever has its library open keeps it."""
    target = directory.with_name(damaged_prefix(directory.name) + secrets.token_hex(4))
    directory.rename(target)
    return target


def check_private(path: str | Path) -> None:
    """Refuse a place of modules that others could have written: opening a library runs its code.

    Parameters
    ----------
    path : str or Path
        The cache, or a folder or file in it; need not exist, then its parents are looked at.

    Raises
    ------
    ModuleNotBuiltError
        When the path belongs to neither this user nor root, when its group or others may write to it, or when others
        may replace it because a parent is writable by all without the sticky bit.
    """
    path = Path(path).absolute()
    for folder in (path, *path.parents):
        try:
            found = folder.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ModuleNotBuiltError(f"{path} cannot be used for modules: {error}; set TILEMLA_CACHE_DIR") from error
        mode = stat.S_IMODE(found.st_mode)
        if folder == path and found.st_uid not in (os.geteuid(), 0):
            raise ModuleNotBuiltError(
                f"{path} is refused as a place for modules, since opening one runs its code: it belongs to user "
                f"{found.st_uid}, not to this user ({os.geteuid()}) or root; set TILEMLA_CACHE_DIR to a directory of "
                "your own"
            )
        shared = stat.S_IWGRP | stat.S_IWOTH if folder == path else stat.S_IWOTH
        if mode & shared and not (folder != path and mode & stat.S_ISVTX):
            raise ModuleNotBuiltError(
                f"{path} is refused as a place for modules, since opening one runs its code: others can write to "
                f"{folder} (mode {mode:04o}); `chmod go-w {folder}` or set TILEMLA_CACHE_DIR to a directory of your own"
            )


def make_private(path: Path) -> None:
    """Make a folder of the cache, and its parents, that nobody else can write to; leave one that is there as it is.

    Raises
    ------
    OSError
        When it cannot be made.
    """
    for folder in (*reversed(path.parents), path):
        folder.mkdir(mode=0o755, exist_ok=True)

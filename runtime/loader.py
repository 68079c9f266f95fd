"""From a kernel spec to a loaded module: built ahead, installed as a wheel, cached, or generated now."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tilemla import env
from tilemla.errors import ModuleNotBuiltError
from tilemla.generate import OnStep, generate_module
from tilemla.host import why_unmet
from tilemla.log import logger
from tilemla.manifest import Manifest, ManifestError, manifest_path
from tilemla.progress import show_progress
from tilemla.spec import KernelSpec
from tilemla.store import (
    Entry,
    Location,
    cache_store,
    check_private,
    entry_dir,
    read_entry,
    search_path,
    why_cannot_generate,
)


class Found(NamedTuple):
    """A module on disk, and the place that it was taken from."""

    entry: Entry
    location: Location


class LoadedModule(NamedTuple):
    """An open module: its functions by name, which keep the library open."""

    manifest: Manifest
    library: Path
    functions: Mapping[str, Callable[..., None]]


_loaded: dict[KernelSpec, LoadedModule] = {}
_load_lock = threading.Lock()

_MEND = {
    "directory": "build it anew with `tilemla build` or take the directory out of TILEMLA_MODULE_PATH",
    "wheel": "install the wheel anew or uninstall it",
}


def find_module(spec: KernelSpec) -> Found | None:
    """Look for a built module without building one.

    Parameters
    ----------
    spec : KernelSpec
        What the module must be specialised on.

    Returns
    -------
    Found or None
        The first one in ``TILEMLA_MODULE_PATH``, in installed module wheels, then in the cache. A damaged cache entry
        counts as none.

    Raises
    ------
    ModuleNotBuiltError
        When a module in ``TILEMLA_MODULE_PATH`` or in a wheel is damaged: it is not ours to replace, and not to be
        passed over. When others can write to the cache.
    """
    for location in search_path(spec.arch):
        if location.kind == "cache":
            _refuse_shared(spec, location.store)
        try:
            entry = read_entry(spec, location.store)
        except ManifestError as error:
            if location.kind == "cache":
                logger().warning("damaged module in the cache: %s", error)
                continue
            raise ModuleNotBuiltError(
                f"{location.label} holds a damaged module: {error}; {_MEND[location.kind]}"
            ) from error
        if entry is not None:
            logger().info("%s: taken from %s (%s)", spec.name, entry.directory, location.label)
            return Found(entry, location)
        logger().info("%s: not in %s (%s)", spec.name, location.store, location.label)
    return None


def _refuse_shared(spec: KernelSpec, store: Path) -> None:
    entry = entry_dir(store, spec.name)
    for path in (env.cache_dir(), store, entry, manifest_path(entry, spec.name), entry / f"{spec.name}.so"):
        if path.exists():
            check_private(path)


def ensure_module(spec: KernelSpec, on_step: OnStep | None = None) -> Found:
    """Find the module of ``spec``, or generate it into the cache.

    Parameters
    ----------
    spec : KernelSpec
        What the module must be specialised on.
    on_step : callable, optional
        Told each step of generating it in a few words; by default they are shown on stderr.

    Returns
    -------
    Found
        The module, whose hash has been checked.

    Raises
    ------
    ModuleNotBuiltError
        When the module is not there and ``TILEMLA_BUILD`` is ``never``, when a prebuilt one is damaged, or when the
        cache is writable by others or cannot be written.
    ModuleBuildError
        When generating it failed.
    """
    reason = spec.why_invalid()
    if reason is not None:
        raise NotImplementedError(f"there is no kernel for this spec: {reason}")
    found = find_module(spec)
    if found is not None:
        return found
    reason = why_cannot_generate(spec.arch)
    if reason is not None:
        raise ModuleNotBuiltError(_explain_missing(spec, reason))
    store = cache_store(spec.arch)
    check_private(env.cache_dir())
    logger().info("%s: generating into %s", spec.name, store)
    if on_step is not None:
        entry, _ = generate_module(spec, store, on_step)
    else:
        with show_progress() as progress:
            entry, made = generate_module(spec, store, lambda step: progress.step(spec.name, step))
            progress.done(spec.name, f"{'generated into' if made else 'found in'} {entry.directory}")
    return Found(entry, Location("cache", store, "cache"))


def _explain_missing(spec: KernelSpec, reason: str) -> str:
    looked = ", ".join(f"{place.store} ({place.label})" for place in search_path(spec.arch))
    return (
        f"{spec.name} is not built and cannot be generated here: {reason}. Looked in {looked or 'no place'}. Where a "
        f"compiler is, build it with `tilemla build {spec.build_options} --out-dir DIR` and put DIR in "
        "TILEMLA_MODULE_PATH, or add --wheel and install the wheel"
    )


def load_module(spec: KernelSpec) -> LoadedModule:
    """Open the module of ``spec``; the second time, return the open one.

    Parameters
    ----------
    spec : KernelSpec
        What the module must be specialised on.

    Raises
    ------
    ModuleNotBuiltError, ModuleBuildError
        As ``ensure_module``; also when this machine lacks what the module needs.
    """
    loaded = _loaded.get(spec)
    if loaded is not None:
        return loaded
    # Not under the lock: several modules may be generated at once, and one that two threads want is made once anyway.
    return load_entry(spec, ensure_module(spec).entry)


def load_entry(spec: KernelSpec, entry: Entry) -> LoadedModule:
    """Open the module of ``spec`` that was found, unless one is open; raises as ``open_module``."""
    with _load_lock:
        loaded = _loaded.get(spec)
        if loaded is None:
            loaded = _loaded[spec] = open_module(entry)
    return loaded


def open_module(entry: Entry) -> LoadedModule:
    """Open a library that has been checked against its manifest.

    Raises
    ------
    ModuleNotBuiltError
        When this machine lacks what the module needs: a driver, C library or C++ library that is new enough.
    """
    reason = why_unmet(entry.manifest.requires)
    if reason is not None:
        raise ModuleNotBuiltError(f"{entry.library} does not run on this machine: {reason}")
    import tvm_ffi

    module = tvm_ffi.load_module(str(entry.library))
    functions = {name: module.get_function(name) for name in KernelSpec.from_dict(entry.manifest.spec).exports}
    return LoadedModule(entry.manifest, entry.library, functions)


def loaded_specs() -> tuple[KernelSpec, ...]:
    """Specs whose modules are open in this process."""
    return tuple(_loaded)

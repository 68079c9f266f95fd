"""From a kernel spec to a loaded module: built ahead, cached, or generated now in a child process."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from tilemla import env
from tilemla.errors import ModuleBuildError, ModuleNotBuiltError
from tilemla.manifest import Manifest, ManifestError, manifest_path, read_manifest, verify_library
from tilemla.source_key import source_key
from tilemla.spec import KernelSpec

PROGRAMS = ("get_mla_metadata", "mla_decode")
_OUTPUT_TAIL_CHARS = 4000


class LoadedModule(NamedTuple):
    """An open module. The functions keep the library open."""

    manifest: Manifest
    library: Path
    get_mla_metadata: Callable[..., None]
    mla_decode: Callable[..., None]


_loaded: dict[KernelSpec, LoadedModule] = {}
_load_lock = threading.RLock()


def _check_entry(spec: KernelSpec, directory: Path, key: str | None) -> tuple[Manifest, Path] | None:
    """The entry of ``spec`` in ``directory``, None when there is none; ManifestError when it is not what it says."""
    path = manifest_path(directory, spec.name)
    if not path.is_file():
        return None
    manifest = read_manifest(path)
    if manifest.spec != spec.to_dict():
        raise ManifestError(f"{path}: expected a module for {spec.to_dict()}, got one for {manifest.spec}")
    missing = [name for name in PROGRAMS if name not in manifest.programs]
    if missing:
        raise ManifestError(f"{path}: the module lacks {', '.join(missing)}")
    if key is not None and manifest.source_key != key:
        raise ManifestError(f"{path}: expected source key {key}, got {manifest.source_key}")
    return manifest, verify_library(manifest, directory)


def cache_entry_dir() -> Path:
    """The directory of cached modules that fit the installed sources and tools."""
    return env.cache_dir() / source_key()


def find_module(spec: KernelSpec) -> tuple[Manifest, Path] | None:
    """Look for a built module without building one.

    Parameters
    ----------
    spec : KernelSpec
        What the module must be specialised on.

    Returns
    -------
    (Manifest, Path) or None
        Manifest and library of the first sound module, in ``TILEMLA_MODULE_PATH``, then in the cache. A damaged cache
        entry counts as none.

    Raises
    ------
    ModuleNotBuiltError
        When a module in ``TILEMLA_MODULE_PATH`` is damaged: it is not ours to replace, and not to be passed over.
    """
    for directory in env.module_path():
        try:
            # Built elsewhere, perhaps with tools that are not here: its source key may differ.
            found = _check_entry(spec, directory, key=None)
        except ManifestError as error:
            raise ModuleNotBuiltError(f"TILEMLA_MODULE_PATH holds a damaged module: {error}") from error
        if found is not None:
            return found
    try:
        return _check_entry(spec, cache_entry_dir(), key=source_key())
    except ManifestError:
        return None


def _delete_entry(spec: KernelSpec, directory: Path) -> None:
    """Remove what a damaged entry left; a process that has the library open keeps its copy."""
    # The manifest first: without it the rest is no entry.
    manifest_path(directory, spec.name).unlink(missing_ok=True)
    for path in directory.glob(f"{spec.name}[._]*"):
        if path.suffix != ".lock":
            path.unlink(missing_ok=True)


def _report(message: str) -> None:
    print(f"tilemla: {message}", file=sys.stderr, flush=True)


def _run_build(spec: KernelSpec, directory: Path) -> None:
    """Generate the module in a child process, so that no compiler state ever enters this one."""
    if not sys.executable:
        raise ModuleBuildError(f"cannot generate {spec.name}: this process has no Python interpreter to start")
    command = [sys.executable, "-m", "tilemla.codegen", "build"]
    command += ["--arch", spec.arch, "--dtype", spec.dtype, "--out", str(directory)]
    _report(f"generating {spec.name} (once; kept in {directory})")
    try:
        # Not in the caller's directory: `-m` would put it first on the child's path.
        child = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:
        raise ModuleBuildError(f"cannot generate {spec.name}: {sys.executable} does not start ({error})") from error
    tail = ""
    with child:
        stream: Any = child.stdout
        while chunk := stream.read1(65536):
            text = chunk.decode(errors="replace")
            sys.stderr.write(text)
            sys.stderr.flush()
            tail = (tail + text)[-_OUTPUT_TAIL_CHARS:]
    if child.returncode != 0:
        raise ModuleBuildError(
            f"generating {spec.name} failed: `{' '.join(command)}` exited with {child.returncode}; "
            f"its last output was:\n{tail.strip()}"
        )


def _acquire_lock(spec: KernelSpec, directory: Path) -> filelock.BaseFileLock:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(directory / f"{spec.name}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            _report(f"waiting for another process that generates {spec.name}")
            lock.acquire()
    except OSError as error:
        raise ModuleNotBuiltError(
            f"{spec.name} is not built and the cache {directory} cannot be written ({error}); set TILEMLA_CACHE_DIR"
        ) from error
    return lock


def ensure_module(spec: KernelSpec) -> tuple[Manifest, Path]:
    """Find the module of ``spec``, or generate it.

    Parameters
    ----------
    spec : KernelSpec
        What the module must be specialised on.

    Returns
    -------
    (Manifest, Path)
        Manifest and library, whose hash has been checked.

    Raises
    ------
    ModuleNotBuiltError
        When the module is not there and ``TILEMLA_DISABLE_BUILD`` is set, or a prebuilt one is damaged.
    ModuleBuildError
        When generating it failed.
    """
    reason = spec.why_invalid()
    if reason is not None:
        raise NotImplementedError(f"there is no kernel for this spec: {reason}")
    found = find_module(spec)
    if found is not None:
        return found
    directory = cache_entry_dir()
    if env.build_disabled():
        looked = ", ".join(str(path) for path in (*env.module_path(), directory))
        raise ModuleNotBuiltError(
            f"{spec.name} is not built and TILEMLA_DISABLE_BUILD is set; looked in {looked}. Build it with "
            f"`tilemla build --arch {spec.arch} --dtype {spec.dtype} --out DIR` and put DIR in TILEMLA_MODULE_PATH"
        )
    lock = _acquire_lock(spec, directory)
    try:
        found = find_module(spec)
        if found is not None:  # another process was faster
            return found
        _delete_entry(spec, directory)
        _run_build(spec, directory)
        try:
            found = _check_entry(spec, directory, key=source_key())
        except ManifestError as error:
            raise ModuleBuildError(
                f"generating {spec.name} left a module that does not check: {error}. If it is the source key: the "
                "sources were changed while this process ran, start it again"
            ) from error
        if found is None:
            raise ModuleBuildError(f"generating {spec.name} left no module in {directory}")
        return found
    finally:
        lock.release()


def load_module(spec: KernelSpec) -> LoadedModule:
    """Open the module of ``spec``; the second time, return the open one.

    Parameters
    ----------
    spec : KernelSpec
        What the module must be specialised on.

    Raises
    ------
    ModuleNotBuiltError, ModuleBuildError
        As ``ensure_module``.
    """
    loaded = _loaded.get(spec)
    if loaded is not None:
        return loaded
    with _load_lock:
        loaded = _loaded.get(spec)
        if loaded is None:
            manifest, library = ensure_module(spec)
            loaded = _loaded[spec] = open_module(manifest, library)
    return loaded


def open_module(manifest: Manifest, library: Path) -> LoadedModule:
    """Open a library that has been checked against its manifest."""
    import tvm_ffi

    module = tvm_ffi.load_module(str(library))
    return LoadedModule(manifest, library, *(module.get_function(name) for name in PROGRAMS))


def loaded_specs() -> tuple[KernelSpec, ...]:
    """Specs whose modules are open in this process."""
    return tuple(_loaded)

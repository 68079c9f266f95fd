"""Generate modules: each in a child process of its own, under a lock, side by side, with progress.

The child is ``python -m tilemla.codegen``. TileLang, TVM and the compilers never enter the process of the caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import filelock

from tilemla import env
from tilemla.config import KernelConfig
from tilemla.errors import ModuleBuildError, ModuleNotBuiltError, ToolchainError
from tilemla.fingerprint import source_fingerprint, tool_versions
from tilemla.log import logger
from tilemla.manifest import ManifestError
from tilemla.spec import KernelSpec
from tilemla.store import Entry, building_prefix, lock_path, make_private, read_entry, set_aside
from tilemla.tuning.chosen import select_config

# A line of the child's output that begins so tells the step that begins; all other lines are a compiler's.
STEP_PREFIX = "tilemla step: "
_OUTPUT_TAIL_CHARS = 4000

OnStep = Callable[[str], None]
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Outcome(Generic[Item]):
    """What became of one module: ``present`` was there and up to date; ``error`` is the compiler's message."""

    item: Item
    state: Literal["built", "present", "failed"]
    seconds: float
    entry: Entry | None
    error: str | None


class _Children:
    """The child processes of this process that are running, so that all can be ended at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()

    @contextlib.contextmanager
    def start(self, command: list[str], cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
        # In a session of its own, so that it can be ended together with the compilers that it started. It ends by
        # itself when its standard input closes, so that no build outlives the process that asked for it.
        child = subprocess.Popen(
            command,
            cwd=cwd,  # not the caller's directory: `-m` would put that first on the child's path
            env=env.for_child(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with self._lock:
            self._running.add(child)
        try:
            yield child
        finally:
            with self._lock:
                self._running.discard(child)
            _kill(child)
            child.__exit__(None, None, None)

    def kill_all(self) -> None:
        with self._lock:
            for child in self._running:
                _kill(child)


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)


_children = _Children()


def is_current(entry: Entry, config: KernelConfig) -> bool:
    """Whether a module was made so, from the sources and with the tools that are here."""
    manifest = entry.manifest
    try:
        tools = tool_versions(manifest.spec["arch"])
    except ToolchainError:
        return False
    return (
        manifest.config == config.to_dict() and manifest.fingerprint == source_fingerprint() and manifest.tools == tools
    )


def _current_entry(spec: KernelSpec, config: KernelConfig, store: Path) -> Entry | None:
    """The module of a spec in a store when it is sound and current; a damaged one is set aside, with a warning."""
    try:
        entry = read_entry(spec, store)
    except ManifestError as error:
        try:
            aside = set_aside(store / spec.name)
        except FileNotFoundError:
            return None  # somebody else was faster
        logger().warning("damaged module set aside as %s and built anew: %s", aside, error)
        return None
    return entry if entry is not None and is_current(entry, config) else None


def generate_module(
    spec: KernelSpec, store: Path, on_step: OnStep, *, config: KernelConfig | None = None, force: bool = False
) -> tuple[Entry, bool]:
    """Make the module of a spec in a store, unless it is there and current.

    Any number of processes may ask at once: one makes it, the others wait and find it.

    Parameters
    ----------
    spec : KernelSpec
        What the module is specialised on.
    store : Path
        Where it goes; made when missing.
    on_step : callable
        Told each step in a few words.
    config : KernelConfig, optional
        What its kernels are tuned by; the one that was chosen for the spec by default.
    force : bool
        Also make one that is there and current.

    Returns
    -------
    (Entry, bool)
        The module, checked, and whether it was made now.

    Raises
    ------
    ModuleBuildError
        When making it failed, with the last output of the compilers; nothing is left in the store.
    ModuleNotBuiltError
        When the store cannot be written.
    """
    config = select_config(spec) if config is None else config
    try:
        make_private(store)
        with _locked(spec, store, on_step):
            entry = _current_entry(spec, config, store)
            if entry is not None and not force:
                return entry, False
            # Only the holder of the lock builds here: what is left was being built by somebody who was killed.
            for leftover in store.glob(f"{building_prefix(spec.name)}*"):
                logger().info("removing what a build that was killed left: %s", leftover)
                shutil.rmtree(leftover, ignore_errors=True)
            _run_child(spec, config, store, on_step)
            return _built_entry(spec, store), True
    except OSError as error:
        raise ModuleNotBuiltError(
            f"{spec.name} is not built and {store} cannot be written ({error}); set TILEMLA_CACHE_DIR to a directory "
            "with space that this user may write to"
        ) from error


@contextlib.contextmanager
def _locked(spec: KernelSpec, store: Path, on_step: OnStep) -> Iterator[None]:
    lock = filelock.FileLock(lock_path(store, spec.name))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        on_step("waiting for another process that makes it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _built_entry(spec: KernelSpec, store: Path) -> Entry:
    try:
        entry = read_entry(spec, store)
    except ManifestError as error:
        raise ModuleBuildError(f"generating {spec.name} left a module that does not check: {error}") from error
    if entry is None:
        raise ModuleBuildError(f"generating {spec.name} left no module in {store}")
    if entry.manifest.fingerprint != source_fingerprint():
        raise ModuleBuildError(
            f"generating {spec.name} gave a module of other sources ({entry.manifest.fingerprint}, here "
            f"{source_fingerprint()}): they were changed while this process ran, start it again"
        )
    return entry


def _run_child(spec: KernelSpec, config: KernelConfig, store: Path, on_step: OnStep) -> None:
    if not sys.executable:
        raise ModuleBuildError(f"cannot generate {spec.name}: this process has no Python interpreter to start")
    words = (json.dumps(spec.to_dict()), json.dumps(config.to_dict()), str(store.absolute()))
    command = [sys.executable, "-m", "tilemla.codegen", *words]
    on_step("starting")
    output = ""
    try:
        with _children.start(command, store) as child:
            stream: Any = child.stdout
            for raw in stream:
                line = raw.decode(errors="replace")
                if line.startswith(STEP_PREFIX):
                    on_step(line.removeprefix(STEP_PREFIX).strip())
                else:
                    output = (output + line)[-_OUTPUT_TAIL_CHARS:]
            status = child.wait()
    except FileNotFoundError as error:
        raise ModuleBuildError(f"cannot generate {spec.name}: {sys.executable} does not start ({error})") from error
    if status != 0:
        ended = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        raise ModuleBuildError(
            f"generating {spec.name} failed: `python -m tilemla.codegen` {ended}; its last output was:\n"
            f"{output.strip()}"
        )


def run_side_by_side(
    items: Sequence[Item],
    make: Callable[[Item], tuple[Entry, bool]],
    *,
    jobs: int = 0,
    on_done: Callable[[Outcome[Item]], None] | None = None,
) -> list[Outcome[Item]]:
    """Make several modules at once and keep going past a failure.

    Parameters
    ----------
    items : sequence
        What to make, such as specs.
    make : callable
        Makes one module; returns it and whether it was made now, raises ``ModuleNotBuiltError``.
    jobs : int
        How many at once; 0 takes as many as this process may use cores.
    on_done : callable, optional
        Told each outcome as it comes, in the thread that waited for it.

    Returns
    -------
    list of Outcome
        One for each item, in order.
    """

    def run(item: Item) -> Outcome[Item]:
        began = time.perf_counter()
        try:
            entry, made = make(item)
            outcome = Outcome(item, "built" if made else "present", time.perf_counter() - began, entry, None)
        except ModuleNotBuiltError as error:
            outcome = Outcome(item, "failed", time.perf_counter() - began, None, str(error))
        if on_done is not None:
            on_done(outcome)
        return outcome

    if not items:
        return []
    workers = min(jobs or len(os.sched_getaffinity(0)), len(items))
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="tilemla-build") as pool:
        try:
            return list(pool.map(run, items))
        except BaseException:  # an interrupt: the threads wait for children that would go on for minutes
            pool.shutdown(wait=False, cancel_futures=True)
            _children.kill_all()
            raise

"""``tilemla clean``: remove modules from the cache."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import filelock

from tilemla import env
from tilemla.cli.output import format_size, make_console, tree_size
from tilemla.errors import ModuleNotBuiltError
from tilemla.manifest import ManifestError, manifest_path
from tilemla.spec import ARCHS, KERNELS
from tilemla.store import check_private, iter_entries, lock_path, search_path, set_aside

_NAME = rf"(?:{'|'.join(KERNELS)})_\w+"
_STORE = re.compile(rf"(?P<version>[^-]+)-(?:{'|'.join(ARCHS)})-.+-[0-9a-f]{{16}}(\+[\w-]+)?")
_ENTRY = re.compile(rf"(?P<name>{_NAME})")
_WORK = re.compile(rf"\.(?P<name>{_NAME})\.(?P<what>building|damaged)-\w+")
_LOCK = re.compile(rf"\.(?P<name>{_NAME})\.lock")
_UNIT_SECONDS = {"h": 3600, "d": 86400, "w": 7 * 86400}
_FEW = 10


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something in the cache that could be removed.

    Parameters
    ----------
    path : Path
        A folder in a store.
    name : str
        The module that it is, or was to be.
    what : str
        ``"module"``, ``"damaged module"``, ``"set aside"`` (a damaged module that was replaced) or ``"unfinished"``
        (what a build that was killed left; one that is under way looks the same, but holds its lock).
    stale : bool
        Whether the sources and tools that are installed here do not look there.
    version : str
        Of the tilemla that made it.
    age_s : float
        Seconds since it was made.
    identity : (int, int)
        Device and inode, to tell that it is still the same.
    """

    path: Path
    name: str
    what: str
    stale: bool
    version: str
    age_s: float
    identity: tuple[int, int]


def _parse_age(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """Hours, days or weeks in seconds."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)([hdw])", value.strip())
    if match is None:
        raise click.BadParameter(f"{value!r} is not an age; give hours, days or weeks, such as 12h, 30d or 2w")
    return float(int(match[1]) * _UNIT_SECONDS[match[2]])


@click.command()
@click.option(
    "--older-than", "age_s", callback=_parse_age, metavar="AGE", help="What was made longer ago: 12h, 30d, 2w."
)
@click.option("--stale", is_flag=True, help="What was made by other sources or tools than those installed here.")
@click.option("--version", metavar="VERSION", help="What was made by this version of tilemla.")
@click.option("--damaged", is_flag=True, help="Damaged modules, and what killed builds left.")
@click.option("--all", "everything", is_flag=True, help="Everything that tilemla put into the cache.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def clean(
    age_s: float | None, stale: bool, version: str | None, damaged: bool, everything: bool, dry_run: bool, yes: bool
) -> None:
    """Remove modules from the cache; shows them and asks first. Other places are never touched.

    Options narrow each other: with several, only what fits all of them is removed. A module that a process has loaded
    can be removed; the process keeps it. One that is being built is left alone.

    \b
    Examples:
      tilemla clean --stale                    after an upgrade
      tilemla clean --older-than 30d --dry-run
      tilemla clean --version 0.1.0 --yes
      tilemla clean --all
    """  # noqa: D301 (the backspace is click's mark of a paragraph that is not wrapped)
    if everything and (age_s is not None or stale or version is not None or damaged):
        raise click.UsageError("--all takes everything; leave it out to narrow what is removed")
    if not everything and age_s is None and not stale and version is None and not damaged:
        raise click.UsageError("say what to remove: --stale, --older-than, --version, --damaged or --all")
    cache = env.cache_dir()
    if not cache.is_dir():
        click.echo(f"Nothing to remove: there is no {cache}.")
        return
    try:
        check_private(cache)
        candidates, foreign = _look_through(cache)
    except (ModuleNotBuiltError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    chosen = [
        candidate
        for candidate in candidates
        if (everything or stale or damaged or candidate.what in ("module", "damaged module"))
        and (age_s is None or candidate.age_s > age_s)
        and (not stale or candidate.stale)
        and (version is None or candidate.version == version)
        and (not damaged or candidate.what != "module")
    ]
    _report_foreign(foreign)
    chosen = [candidate for candidate in chosen if not _is_held(candidate)]
    if not chosen:
        click.echo(f"Nothing to remove in {cache}.")
        return
    _print_candidates(cache, chosen)
    if dry_run:
        return
    if not yes:
        click.confirm("Remove them?", abort=True, err=True)
    sys.exit(0 if _remove_all(chosen) else 1)


def _look_through(cache: Path) -> tuple[list[Candidate], list[Path]]:
    """What could be removed, and what lies in the cache but is not ours. Links are never followed."""
    live = {location.store for arch in ARCHS for location in search_path(arch)}
    candidates: list[Candidate] = []
    foreign: list[Path] = []
    for store in sorted(cache.iterdir()):
        match = _STORE.fullmatch(store.name)
        if match is None or store.is_symlink() or not store.is_dir():
            foreign.append(store)
            continue
        is_stale = store not in live
        broken = {path for path, found in iter_entries(store) if isinstance(found, ManifestError)}
        for path in sorted(store.iterdir()):
            entry, work = _ENTRY.fullmatch(path.name), _WORK.fullmatch(path.name)
            if _LOCK.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                continue
            if path.is_symlink() or not path.is_dir() or not (entry or work):
                foreign.append(path)
            elif entry:
                # What this version finds damaged in another version's store may be sound for that one.
                what = "damaged module" if path in broken and not is_stale else "module"
                made = manifest_path(path, path.name)
                candidates += _candidate(path, entry["name"], what, is_stale, match["version"], made)
            elif work:
                what = {"building": "unfinished", "damaged": "set aside"}[work["what"]]
                candidates += _candidate(path, work["name"], what, is_stale, match["version"], path)
    return candidates, foreign


def _candidate(path: Path, name: str, what: str, stale: bool, version: str, made: Path) -> Iterator[Candidate]:
    try:
        found = path.lstat()
        seconds = made.lstat().st_mtime if made.exists() else found.st_mtime
    except FileNotFoundError:
        return  # removed by somebody else meanwhile
    yield Candidate(path, name, what, stale, version, time.time() - seconds, (found.st_dev, found.st_ino))


def _report_foreign(foreign: Sequence[Path]) -> None:
    for path in foreign[:_FEW]:
        click.echo(f"left alone, unknown to tilemla: {path}", err=True)
    if len(foreign) > _FEW:
        click.echo(f"left alone, unknown to tilemla: {len(foreign) - _FEW} more", err=True)


def _is_held(candidate: Candidate) -> bool:
    """Whether somebody is making the module now; says so."""
    path = lock_path(candidate.path.parent, candidate.name)
    if not path.exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0):
            return False
    except filelock.Timeout:
        _report_held(candidate)
        return True
    except OSError:
        return False  # removing it will tell why


def _report_held(candidate: Candidate) -> None:
    click.echo(f"left alone, another process is building it: {candidate.path}", err=True)


def _print_candidates(cache: Path, chosen: Sequence[Candidate]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("what")
    table.add_column(f"in {cache}", overflow="fold")
    table.add_column("age", justify="right")
    table.add_column("size", justify="right")
    total_bytes = 0
    for candidate in chosen:
        size_bytes = tree_size(candidate.path)
        total_bytes += size_bytes
        what = f"{candidate.what}, stale" if candidate.stale else candidate.what
        table.add_row(what, str(candidate.path.relative_to(cache)), _age(candidate.age_s), format_size(size_bytes))
    make_console().print(table)
    click.echo(f"{len(chosen)} in all, {format_size(total_bytes)}")


def _age(seconds: float) -> str:
    for unit in ("d", "h"):
        if seconds >= _UNIT_SECONDS[unit]:
            return f"{seconds / _UNIT_SECONDS[unit]:.0f} {unit}"
    return f"{max(seconds, 0) / 60:.0f} min"


def _remove_all(chosen: Sequence[Candidate]) -> bool:
    """Remove what was shown, say how much that freed, and return whether nothing failed."""
    removed, freed_bytes, failed = 0, 0, False
    for candidate in chosen:
        size_bytes = tree_size(candidate.path)
        try:
            with filelock.FileLock(lock_path(candidate.path.parent, candidate.name), timeout=0):
                done = _remove(candidate)
        except filelock.Timeout:
            _report_held(candidate)
            continue
        except OSError as error:
            click.echo(f"cannot be removed: {candidate.path}: {error}", err=True)
            failed = True
            continue
        if done:
            removed, freed_bytes = removed + 1, freed_bytes + size_bytes
    for store in dict.fromkeys(candidate.path.parent for candidate in chosen):
        _remove_empty(store)
    click.echo(f"Removed {removed}, freed {format_size(freed_bytes)}.")
    return not failed


def _remove(candidate: Candidate) -> bool:
    """Remove it while its lock is held; False when it is no longer what was shown."""
    path = candidate.path
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if (found.st_dev, found.st_ino) != candidate.identity:
        click.echo(f"left alone, it was changed meanwhile: {path}", err=True)
        return False
    # A module goes at once or not at all: half of one would be a damaged module.
    shutil.rmtree(path if path.name.startswith(".") else set_aside(path))
    return True


def _remove_empty(store: Path) -> None:
    """Remove a store in which only locks are left, unless one is held."""
    with contextlib.suppress(OSError, filelock.Timeout):
        locks = list(store.iterdir())
        if not all(_LOCK.fullmatch(path.name) for path in locks):
            return
        for path in locks:
            with filelock.FileLock(path, timeout=0):
                path.unlink()
        store.rmdir()

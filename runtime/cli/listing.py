"""``tilemla list``: the modules that are here."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from tilemla.cli.output import format_size, make_console, tree_size
from tilemla.host import why_unmet
from tilemla.manifest import ManifestError
from tilemla.spec import ARCHS, KernelSpec
from tilemla.store import Entry, Location, iter_cache_stores, iter_entries, require_spec, search_path

_STYLES = {"ok": "green", "stale": "dim", "unmet": "yellow", "damaged": "bold red"}
_MEANINGS = {
    "damaged": "In the cache it is built anew when it is needed; elsewhere it is an error when it is.",
    "unmet": "This machine lacks what the module needs.",
    "stale": "Made by other sources or tools than those that are installed here, which do not look at it; "
    "`tilemla clean --stale` removes it.",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One module on disk.

    Parameters
    ----------
    name : str
        Name of its folder, which is that of the spec.
    location : str
        ``"directory"``, ``"wheel"`` or ``"cache"``.
    label : str
        The variable or distribution that its place comes from.
    directory : Path
        Its folder.
    size_bytes, library_bytes : int
        Of all of its files, and of the library alone.
    state : str
        ``"ok"``; ``"damaged"``; ``"unmet"`` when this machine lacks what it needs; ``"stale"`` when it lies in the
        cache, but the sources and tools that are installed here do not look there.
    why : str
        What is wrong; empty when nothing is.
    manifest : dict
        Spec, versions and hash from the manifest; empty when that cannot be read.
    """

    name: str
    location: str
    label: str
    directory: Path
    size_bytes: int
    library_bytes: int
    state: Literal["ok", "damaged", "unmet", "stale"]
    why: str
    manifest: dict[str, Any]


@click.command("list")
@click.option("--arch", "archs", multiple=True, type=click.Choice(ARCHS), help="Only this architecture; repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print the modules as JSON on stdout.")
def list_modules(archs: tuple[str, ...], as_json: bool) -> None:
    """List the modules that are here, in the order in which they are searched, and check their hashes.

    The exit status is 1 when one is damaged.

    \b
    Examples:
      tilemla list
      tilemla list --arch sm_90a
      tilemla list --json | jq -r '.modules[] | select(.state == "ok") | .directory'
    """  # noqa: D301 (the backspace is click's mark of a paragraph that is not wrapped)
    try:
        locations, live = find_stores()
        rows = [row for location in locations for row in _rows_of(location, live) if _is_for(row, archs or ARCHS)]
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        fields = [dataclasses.asdict(row) | {"directory": str(row.directory)} for row in rows]
        searched = [location._asdict() | {"store": str(location.store)} for location in locations]
        click.echo(json.dumps({"searched": searched, "modules": fields}, indent=2))
    elif rows:
        _print_rows(locations, rows)
    else:
        _print_none(locations, archs)
    sys.exit(1 if any(row.state == "damaged" for row in rows) else 0)


def find_stores() -> tuple[list[Location], set[Path]]:
    """Every store, those in the cache that modules are not looked for in last, and the set of those that they are."""
    paths = [list(search_path(arch)) for arch in ARCHS]
    live = {location.store for path in paths for location in path}
    locations = [location for location in paths[0] if location.kind != "cache"]
    cached = sorted(iter_cache_stores(), key=lambda store: store not in live)
    return locations + [Location("cache", store, "cache") for store in cached], live


def _rows_of(location: Location, live: set[Path]) -> Iterator[Row]:
    for directory, found in iter_entries(location.store):
        manifest: dict[str, Any] = {}
        state: Literal["ok", "damaged", "unmet", "stale"] = "ok"
        library = directory / f"{directory.name}.so"
        why = ""
        if isinstance(found, ManifestError):
            state, why = "damaged", str(found)
        else:
            library = found.library
            kept = ("spec", "sha256", "tilemla_version", "tools", "fingerprint", "requires")
            fields = dataclasses.asdict(found.manifest)
            manifest = {name: fields[name] for name in kept}
            damage, unmet = _why_damaged(found), why_unmet(found.manifest.requires)
            if damage is not None:
                state, why = "damaged", damage
            elif unmet is not None:
                state, why = "unmet", unmet
        if location.store not in live:
            # Whatever is wrong with it: it may be sound for the version that made it.
            state = "stale"
        sizes = tree_size(directory), tree_size(library)
        yield Row(directory.name, location.kind, location.label, directory, *sizes, state, why, manifest)


def _why_damaged(entry: Entry) -> str | None:
    """What a call that needs the module would find wrong with it, beside its hash."""
    try:
        spec = KernelSpec.from_dict(entry.manifest.spec)
        if spec.name != entry.directory.name:
            return f"{entry.directory}: expected a module for {entry.directory.name}, got one for {spec.name}"
        require_spec(entry, spec)
    except ValueError as error:
        return str(error)
    return None


def _is_for(row: Row, archs: Sequence[str]) -> bool:
    return any(f"_{arch}_" in row.name for arch in archs)


def _print_rows(locations: Sequence[Location], rows: Sequence[Row]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    for location in locations:
        here = [row for row in rows if row.directory.parent == location.store]
        if not here:
            continue
        console.print(Text(f"{location.store} ({location.label})", style="bold"), soft_wrap=True)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("module", overflow="fold")
        table.add_column("tilemla")
        table.add_column("made with", overflow="fold")
        table.add_column("size", justify="right")
        table.add_column("library", justify="right")
        table.add_column("state")
        for row in here:
            tools = ", ".join(f"{name} {version}" for name, version in row.manifest.get("tools", {}).items())
            table.add_row(
                row.name,
                row.manifest.get("tilemla_version", "?"),
                tools or "?",
                format_size(row.size_bytes),
                format_size(row.library_bytes),
                Text(row.state, style=_STYLES[row.state]),
            )
        console.print(table)
        for row in here:
            if row.why and row.state != "stale":
                console.print(Text(f"{row.state}: {row.why}", style=_STYLES[row.state]), soft_wrap=True)
        console.print()
    for state, meaning in _MEANINGS.items():
        if any(row.state == state for row in rows):
            console.print(Text(f"{state}: {meaning}"))


def _print_none(locations: Sequence[Location], archs: Sequence[str]) -> None:
    from tilemla import env

    places = [f"{location.store} ({location.label})" for location in locations if location.kind != "cache"]
    options = "".join(f" --arch {arch}" for arch in archs)
    click.echo(f"No modules were found; looked in {', '.join([*places, f'{env.cache_dir()} (cache)'])}.")
    click.echo(f"Build some: tilemla build --preset deepseek-v3{options}")
